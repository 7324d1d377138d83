"""benchmarks.sweep: trainings that were interrupted, and folders of other trainings."""

import threading
import time

import pytest

from iwm_fast.benchmarks.sweep import run_jobs, run_one
from iwm_fast.errors import UserError

TINY = [
    "model.encoder={depth: 1, width: 32, heads: 2}", "model.predictor.depth=1", "model.predictor.width=32",
    "train.global_batch=8", "train.warmup=1", "train.schedule_steps=6", "log.every_steps=1",
]  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_training_is_resumed_and_one_of_other_settings_is_left_as_it_is(tiny_images, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / split).symlink_to(tiny_images, target_is_directory=True)
    words = ("demo.yaml", data, tmp_path / "run", 0)
    measure = ["--what", "knn"]
    run_one(*words, [*TINY, "train.steps=3"], measure)  # as if it had been stopped there
    resumed = run_one(*words, [*TINY, "train.steps=6"], measure)
    whole = run_one("demo.yaml", data, tmp_path / "whole", 0, [*TINY, "train.steps=6"], measure)
    assert (resumed["resumed"], whole["resumed"]) == (True, False)
    assert resumed["steps"] == whole["steps"] == 6
    for key in ("loss_last", "rank_me", "knn"):
        assert resumed["evaluation"][key] == whole["evaluation"][key]
    assert [line["loss"] for line in resumed["curve"] if "loss" in line] == [
        line["loss"] for line in whole["curve"] if "loss" in line
    ]
    with pytest.raises(UserError, match="pretrain ended with exit code 2"):
        run_one(*words, [*TINY, "train.steps=6", "train.lr=0.5"], measure)
    assert "train.lr" in capfd.readouterr().err


def test_jobs_run_at_once_and_after_a_failure_no_other_starts():
    both = threading.Barrier(2)
    run_jobs(both.wait, [(60,), (60,)], 2)  # one at a time would wait for the other in vain
    started = []

    def fail_at_first(place):
        started.append(place)
        if place == 0:
            raise UserError("no such run")
        time.sleep(0.05)  # one or two may have begun before the failure was seen

    with pytest.raises(UserError, match="no such run"):
        run_jobs(fail_at_first, [(place,) for place in range(100)], 1)
    assert len(started) < 100
