"""Warnings of the log: one per episode."""

import pytest

from iwm_fast.engine.distributed.stragglers import Stragglers
from iwm_fast.engine.metrics.episodes import CLEAR, Episode, FaultWatch


@pytest.mark.parametrize(("clear", "again"), [(CLEAR - 1, False), (CLEAR, True)])
def test_an_episode_ends_after_enough_steps_without_the_fault(clear, again):
    episode = Episode()
    assert [episode.begins(True) for _ in range(3)] == [True, False, False]
    assert not any(episode.begins(False) for _ in range(clear))
    assert episode.begins(True) is again


def test_skipped_steps_and_undecodable_images_are_reported_once_per_episode(tmp_path):
    watch = FaultWatch(10, tmp_path / "bad_samples.jsonl")
    said = [watch.look({"step": i, "bad_samples": bad}, skipped) for i, (bad, skipped) in enumerate(
        [(0, 0), (2, 1), (3, 4), (3, 0), (3, 0), (3, 0), (3, 2), (4, 0)]
    )]  # fmt: skip
    assert [len(lines) for lines in said] == [0, 2, 0, 0, 0, 0, 1, 1]
    skipped, undecodable = said[1]
    assert skipped.startswith("step 1: loss or gradient not finite in 1 step(s)")
    assert "more than 10 in a row end the run (train.max_skipped)" in skipped
    assert undecodable.startswith("step 1: 2 image(s) cannot be decoded")
    assert str(tmp_path / "bad_samples.jsonl") in undecodable


def test_a_rank_that_is_slow_on_and_off_is_named_once():
    watch = Stragglers(1.25)
    slow, fast = [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]
    said = [watch.look(own, 3.0) is not None for own in [slow] * 3 + [fast] + [slow] * 4 + [fast] * 3 + [slow] * 3]
    assert [i for i, line in enumerate(said) if line] == [2, 13]
