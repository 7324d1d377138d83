"""`benchmarks.flops_saved` under its old name."""

from iwm_fast.benchmarks.old_names import run_renamed

if __name__ == "__main__":
    run_renamed("savings", "flops_saved")
