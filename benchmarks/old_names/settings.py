"""`benchmarks.setting_gain` under its old name."""

from iwm_fast.benchmarks.old_names import run_renamed

if __name__ == "__main__":
    run_renamed("settings", "setting_gain")
