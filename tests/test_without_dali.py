"""Parts that read no images run where DALI is missing; where images are read, that is said in one line."""

from __future__ import annotations

import subprocess
import sys

from small_run import TINY_WORDS

# As where it is not installed: an import of it raises ImportError.
_MISSING = "import sys; sys.modules['nvidia.dali'] = None; from iwm_fast.cli import main; sys.exit(main(sys.argv[1:]))"


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", _MISSING, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_step_is_timed_on_random_pixels():
    config, *words = TINY_WORDS
    done = _run("bench", "step", "--config", config, *words, "--repeats", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout


def test_a_training_says_what_is_missing(tiny_images, tmp_path):
    done = _run("pretrain", *TINY_WORDS, f"data.root={tiny_images}", "--out", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "install nvidia-dali-cuda130" in done.stderr.splitlines()[-1]
