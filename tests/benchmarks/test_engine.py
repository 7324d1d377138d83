"""The engine against a bare loop: both train the same weights, however the batch is composed."""

from __future__ import annotations

import pytest
from small_run import small_config

from iwm_fast.benchmarks.engine import measure

MLP = {
    "model__predictor": {"kind": "mlp", "depth": 1, "width": 32, "conditioning": "block"},
    "actions__groups": ["photometric"],
}


@pytest.mark.parametrize(
    ("changes", "sources"),
    [({"views__sources_per_target": 3, "train__static_shapes": True}, 3), (MLP, 1)],
    ids=["sources", "mlp"],
)
def test_both_train_the_same_weights_on_every_batch_and_say_how_many_sources_it_has(changes, sources):
    (row,) = measure(small_config("unread", log__every_steps=10**6, **changes), [0], repeats=2)
    assert (row["batch"], row["sources_per_target"], row["ranks"], row["stage"]) == (8, sources, 1, 0)
    assert {name: len(times) for name, times in row["seconds"].items()} == {"bare": 2, "engine": 2}
