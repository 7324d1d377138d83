"""Parts that read no images run without DALI; parts that read images say so in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from no_dali import python_without_dali
from small_run import TINY_WORDS

from iwm_fast.benchmarks.gpu_suite import PARTS

# As if not installed: importing it raises ImportError.
_MISSING = (
    "import sys; sys.modules['nvidia.dali'] = None; from iwm_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


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


@pytest.fixture(scope="module")
def missing(tmp_path_factory):
    """An interpreter with all packages except DALI, inherited by what it starts."""
    return python_without_dali(tmp_path_factory.mktemp("without_dali"))


def _suite(python: Path, out: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    words = ["--device", "cpu", "--out", str(out), "--parts", *parts, "--patience", "6", "--budget", "1800"]
    # Its own packages only: no path of this process may lead to DALI.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-W", "ignore", "-m", "iwm_fast.benchmarks.gpu_suite", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=own)


def test_the_interpreter_has_everything_but_dali(missing):
    """As if never installed: the name is unknown, and so is the distribution."""
    script = """
import importlib.metadata, importlib.util, torch, numpy
print(importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None)
print([d.name for d in importlib.metadata.distributions() if "dali" in d.name])
"""
    done = subprocess.run([missing, "-c", script], capture_output=True, text=True, check=False, env={})
    assert done.stdout.splitlines() == ["None", "[]"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if "dali" not in part.needs])
def test_a_part_of_the_gpu_suite_that_needs_no_dali_runs_to_its_end(missing, tmp_path, name):
    done = _suite(missing, tmp_path, name)
    assert done.stdout.startswith(f"{name}: done in "), done.stdout + done.stderr
    assert done.returncode == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())["result"]
    # pytest writes no JSON, ceilings and profile no rows
    assert result.get("rows") or name in ("tests", "ceilings", "profile")
    assert result or name == "tests"


@pytest.mark.slow
def test_the_gpu_suite_says_what_is_missing_where_it_is_needed_and_continues(missing, tmp_path):
    done = _suite(missing, tmp_path, "doctor", "train", "ceilings")
    assert done.returncode == 1
    doctor, train, ceilings, archive = done.stdout.splitlines()
    assert doctor.startswith("doctor: exit code 1: DALI: not installed: pip install nvidia-dali-cuda130. in ")
    assert "images are decoded by NVIDIA DALI" in train
    assert "No module named 'nvidia" in train
    assert "install nvidia-dali-cuda130" in train
    assert ceilings.startswith("ceilings: done in ")
    assert archive.startswith("results.tar.gz: ")
    (row,) = json.loads((tmp_path / "train.json").read_text())["result"]["rows"]
    assert "install nvidia-dali-cuda130" in row["error"]
    assert "Traceback" not in row["error"]
