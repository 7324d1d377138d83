"""benchmarks.optimizers: the three implementations of Muon agree, and one that does not is not timed."""

from __future__ import annotations

import pytest
import torch

from iwm_fast.benchmarks import optimizers
from iwm_fast.benchmarks.optimizers import CONTENDERS, measure_optimizers

SMALL = ["model.encoder={depth: 1, width: 32, heads: 2}", "model.predictor.depth=1", "model.predictor.width=32"]


def test_all_contenders_make_our_updates(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)  # DeepSpeed would compile for a minute
    found = measure_optimizers("vit_tiny_p4_32.yaml", SMALL, torch.device("cpu"), repeats=2)
    assert set(found["cosine"]) == set(found["ratio"]) == set(CONTENDERS)
    assert min(found["cosine"].values()) > 0.98
    assert all(len(own) == 2 for own in found["seconds"].values())


def test_another_direction_is_not_timed(monkeypatch):
    def backwards(model):
        step = CONTENDERS["iwm-fast"](model)

        def turned():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.neg_()
            step()

        return turned

    monkeypatch.setattr(optimizers, "CONTENDERS", {"iwm-fast": CONTENDERS["iwm-fast"], "turned": backwards})
    monkeypatch.setattr(optimizers, "_VERSIONS", {"iwm-fast": "iwm-fast", "turned": "torch"})
    with pytest.raises(RuntimeError, match="updates point elsewhere"):
        measure_optimizers("vit_tiny_p4_32.yaml", SMALL, torch.device("cpu"), repeats=1)
