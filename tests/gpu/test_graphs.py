"""Captured steps against the same steps without graphs, on a GPU."""

from __future__ import annotations

import pytest
import torch
from small_run import losses, metrics, small_config

from iwm_fast.engine import pretrain
from iwm_fast.engine.graphs import GraphedStep


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_graphs_has_the_losses_of_the_training_without(
    tiny_images, tmp_path, monkeypatch, stage, precision
):
    """The loss's factor is applied elsewhere: the last bit of a gradient may differ, and everything after it."""
    captured = []
    capture = GraphedStep._capture

    def noting(graphed, key, arguments):
        captured.append(key)
        return capture(graphed, key, arguments)

    monkeypatch.setattr(GraphedStep, "_capture", noting)
    for name, graph in (("eager", False), ("graph", True)):
        config = small_config(
            tiny_images, train__steps=40, train__static_shapes=True, train__static_multiple=128, train__epochs=40.0,
            train__cuda_graph=graph, train__precision=precision, zero__stage=stage, data__device="gpu",
        )  # fmt: skip
        pretrain(config, tmp_path / name)
    assert captured
    assert losses(tmp_path / "graph") == pytest.approx(
        losses(tmp_path / "eager"), rel=5e-2 if precision == "bf16" else 1e-3
    )
    assert metrics(tmp_path / "graph")[-1]["rank_me"] == pytest.approx(
        metrics(tmp_path / "eager")[-1]["rank_me"], rel=5e-2
    )


def test_after_warm_up_a_step_with_graphs_allocates_and_tunes_nothing(tiny_images, tmp_path):
    """A new size reserves more memory; with a single size there is none after its capture."""
    config = small_config(
        tiny_images, train__steps=30, train__static_shapes=True, train__static_multiple=512, train__epochs=40.0,
        train__cuda_graph=True, train__precision="bf16", zero__stage=1, data__device="gpu",
    )  # fmt: skip
    pretrain(config, tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert records[-1]["token_sizes"] == 1
    assert records[-1]["memory_bytes"] == records[9]["memory_bytes"]
    assert torch.cuda.max_memory_allocated() == records[-1]["memory_bytes"]
