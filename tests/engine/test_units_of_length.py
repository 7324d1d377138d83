import json

import pytest
import torch

from iwm_fast.engine import pretrain
from tests.small_run import metrics, small_config, state

STEPS = 4


@pytest.fixture(scope="module")
def in_steps(tiny_images, tmp_path_factory):
    run = tmp_path_factory.mktemp("steps") / "run"
    pretrain(small_config(tiny_images, train__steps=STEPS, train__warmup=3), run)
    return run


def test_warm_up_and_checkpoints_in_other_units_train_and_resume_as_in_steps(in_steps, tiny_images, tmp_path, capsys):
    """24 images in batches of 8 are 3 steps per epoch."""
    asked = {"train__warmup": 0, "train__warmup_epochs": 1.0, "checkpoint__every_epochs": 0.67, "train__steps": 3}
    pretrain(small_config(tiny_images, **asked), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_000002", "step_000003"]
    pretrain(small_config(tiny_images, **asked | {"train__steps": STEPS}), tmp_path / "run", "auto")

    first, second = (state(run, STEPS) for run in (in_steps, tmp_path / "run"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [r["lr"] for r in metrics(in_steps)] == [r["lr"] for r in metrics(tmp_path / "run")]
    assert "train.warmup_epochs 1 is 3 of 20 steps" in capsys.readouterr().err
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["steps"]["train.warmup"] for start in starts] == [3, 3]
    assert [start["steps"]["checkpoint.every_steps"] for start in starts] == [2, 2]
