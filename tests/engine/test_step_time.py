"""What counts as a step's time."""

from __future__ import annotations

from types import SimpleNamespace

from small_run import metrics, small_config

from iwm_fast.engine import pretrain
from iwm_fast.engine import step as loop


def test_what_is_computed_for_the_log_alone_is_no_part_of_a_steps_time(tiny_images, tmp_path, monkeypatch):
    """By a clock that advances a little at each reading, and by a thousand seconds while RankMe is computed."""
    now = [0.0]

    def look() -> float:
        now[0] += 1e-3
        return now[0]

    def slow_rank_me(features):
        now[0] += 1000.0
        return shipped(features)

    shipped = loop.rank_me
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(loop, "rank_me", slow_rank_me)
    pretrain(small_config(tiny_images, train__steps=3, log__every_steps=1), tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert len(records) == 3
    assert all(record["diagnostics_s"] > 1000 for record in records)
    assert all(record["step_s"] < 1 for record in records)
