"""Host synchronisations of a step: reading a tensor's value waits for a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_run import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.engine import step as loop
from iwm_fast.engine import train

aten = torch.ops.aten
# Operators whose result the host needs: a value, or a shape that depends on values.
WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}


class Waits(TorchDispatchMode):
    """Counts synchronisations by the part of the step."""

    def __init__(self):
        super().__init__()
        self.part = ""
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            self.found[self.part] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_step(folder, out, monkeypatch, **changes):
    """Return those of the fourth and fifth step, by part: they are not logged, and DeepSpeed has traced stage 3."""
    watched = []
    train_step = loop.Trainer.train_step

    def step(trainer):
        waits = Waits()

        class Named(loop.Spans):
            def __call__(self, part):
                waits.part = part
                return super().__call__(part)

        trainer.new_spans = Named
        with waits:
            record = train_step(trainer)
        if record is None:
            watched.append(waits.found)
        return record

    monkeypatch.setattr(loop.Trainer, "train_step", step)
    train.pretrain(small_config(folder, train__steps=6, log__every_steps=6, **changes), out)
    assert len(watched) == 4
    return watched[-2:]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_a_step_at_stage_0_never_waits(tiny_images, tmp_path, monkeypatch, optimizer):
    found = waits_of_a_step(tiny_images, tmp_path / "run", monkeypatch, train__optimizer=optimizer, train__clip=1.0)
    assert found == [{}] * 2


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_a_step_at_stages_1_and_2_never_waits(tiny_images, tmp_path, monkeypatch, stage, precision):
    changes = {"zero__stage": stage, "train__precision": precision, "train__clip": 1.0}
    assert waits_of_a_step(tiny_images, tmp_path / "run", monkeypatch, **changes) == [{}] * 2


def test_forward_backward_and_the_ema_never_wait_at_stage_3(tiny_images, tmp_path, monkeypatch):
    """The synchronisations in the optimizer there are DeepSpeed's: its norm, and under bf16 its finite check."""
    changes = {"zero__stage": 3, "train__precision": "bf16"}
    for found in waits_of_a_step(tiny_images, tmp_path / "run", monkeypatch, **changes):
        assert set(found) <= {"optimizer"}
        assert 1 <= found["optimizer"] <= 3
