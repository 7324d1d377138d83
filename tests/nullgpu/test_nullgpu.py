"""Trainings and the presets' steps on the null GPU, against the counts that were committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def _null(*words: str, limit: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.nullgpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)


def test_every_training_of_the_matrix_ends_with_its_metrics_and_its_checkpoint():
    done = _null("matrix")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "23 passed, 0 failed"


@pytest.mark.parametrize("preset", ["gpu-small", "gpu-base", "gpu-large"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_launches_and_waits_no_more_than_was_committed(tmp_path, preset, stage):
    (committed,) = [
        row
        for row in json.loads((RESULTS / f"nullgpu_{preset.replace('-', '_')}.json").read_text())["rows"]
        if row["stage"] == stage
    ]
    done = _null("step", preset, *committed["overrides"], "--json", str(tmp_path / "step.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "step.json").read_text())["step"]
    for count in ("launches", "library", "collectives", "waits"):
        assert found[count] <= 1.02 * committed["step"][count], count


def test_the_suite_of_the_gpu_ends_within_its_budget_and_each_part_leaves_its_rows(tmp_path):
    """Parts that compare answers or need DALI's GPU operators fail there, and say so; all end."""
    done = _null("run", "-m", "benchmarks.gpu_suite", "--out", str(tmp_path))
    for name in ("ceilings", "step", "attention", "kernels", "profile", "peers", "tests", "train", "settings"):
        assert (tmp_path / f"{name}.json").exists(), done.stdout + done.stderr[-2000:]
    assert (tmp_path / "results.tar.gz").exists()
