"""A setting's gain is reported only if both steps compute the same."""

from pathlib import Path

import pytest
from small_run import small_config

from iwm_fast.benchmarks.setting_gain import measure_setting
from iwm_fast.engine.distributed.ranks import start


def sides(**changes):
    plain = small_config(Path("unused"), log__every_steps=10)
    return {"without": plain, "with": small_config(Path("unused"), log__every_steps=10, **changes)}


def test_both_settings_are_timed_in_turn_after_the_tenth_step():
    row = measure_setting(sides(train__activation_checkpointing=True), start(), repeats=3)
    assert row["loss_difference"] < 1e-5
    assert {side: len(times) for side, times in row["seconds"].items()} == {"without": 3, "with": 3}
    assert row["speed_ratio_interval"][0] <= row["speed_ratio"] <= row["speed_ratio_interval"][1]
    assert row["compilations"] == row["compilations_after_tenth_step"] == 0


def test_a_setting_that_changes_the_losses_is_not_timed():
    with pytest.raises(RuntimeError, match="not timed"):
        measure_setting(sides(train__lr=0.05), start(), repeats=1)


def test_another_architecture_is_timed_per_token_too():
    """Two prefix tokens in each target, and in each context."""
    row = measure_setting(sides(model__prefix_tokens=2, model__positions="rope"), start(), repeats=1)
    without, under = (row["per_image"][side] for side in ("without", "with"))
    assert under["tokens"] == without["tokens"] + 4
    assert under["flops"] > without["flops"]
    assert row["time_ratio_per_token"] == pytest.approx(without["tokens"] / under["tokens"] / row["speed_ratio"])
