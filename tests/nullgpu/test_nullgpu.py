"""Trainings and steps of the presets on the null GPU, against committed counts."""

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
    assert done.stdout.splitlines()[-1] == "26 passed, 0 failed"


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


@pytest.mark.parametrize("preset", ["gpu-small", "gpu-base"])
def test_no_kernel_is_compiled_after_the_first_step_whatever_the_masks(tmp_path, preset):
    """24 batches with different masks. If the first update is skipped, the second step's EMA is the first."""
    words = [preset, "zero.stage=1", "--steps", "24", "--json", str(tmp_path / "step.json")]
    done = _null("step", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    first, second, *rest = json.loads((tmp_path / "step.json").read_text())["compiled"]
    assert first
    assert set(second) <= {"average_kernel"}
    assert rest == [[]] * 22


@pytest.mark.parametrize("preset", ["gpu-small", "gpu-base"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_launches_what_is_counted_without_any_gpu(tmp_path, preset, stage):
    """`benchmarks.launches` on PyTorch's CPU build against the launches of its CUDA build, in all and by span."""
    words = [preset, f"zero.stage={stage}", "--json"]
    walked = _null("step", *words, str(tmp_path / "walked.json"))
    assert walked.returncode == 0, walked.stdout[-3000:] + walked.stderr[-2000:]
    command = [sys.executable, "-m", "benchmarks.launches", *words, str(tmp_path / "counted.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    null, counted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("walked", "counted"))
    assert counted["total"] == pytest.approx(null["step"]["launches"] + null["step"]["library"], rel=0.02)
    for span in ("forward", "backward", "optimizer", "ema"):
        found = sum(row["triton"] + row["torch"] for row in counted["rows"] if row["part"].split("/")[0] == span)
        wanted = null["parts"][span]["launches"] + null["parts"][span]["library"]
        assert found == pytest.approx(wanted, rel=0.02, abs=2), span


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_a_graph_captures_waits_for_nothing_uploads_nothing_and_stays_where_it_is(tmp_path, stage):
    words = ["train.global_batch=32", "train.micro_batch=16", f"zero.stage={stage}"]
    done = _null("graphs", "gpu-small", *words, "--json", str(tmp_path / "graphs.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "graphs.json").read_text())
    assert found["captures"] == len(found["sizes"])
    assert (found["moved"], found["replay"]["allocations"], found["replay"]["collectives"]) == (0, 0, 0)


def test_the_suite_of_the_gpu_ends_within_its_budget_and_each_part_leaves_its_rows(tmp_path):
    """Parts that compare results or need DALI's GPU operators fail there, and say so; all end."""
    done = _null("run", "-m", "benchmarks.gpu_suite", "--out", str(tmp_path))
    for name in ("ceilings", "step", "attention", "kernels", "profile", "peers", "tests", "train", "settings"):
        assert (tmp_path / f"{name}.json").exists(), done.stdout + done.stderr[-2000:]
    assert (tmp_path / "results.tar.gz").exists()
