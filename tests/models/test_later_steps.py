"""Several steps ahead: predictions fed back with gradient, against a float64 roll-out by hand, sample by sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import nine_patches

from iwm_fast.config.schema import ModelConfig
from iwm_fast.models import IWM
from iwm_fast.models.later_steps import every_patch, later_steps
from iwm_fast.models.packing import pack

ACTIONS, PATCHES = 3, 9
CONTEXT = ([0, 2, 3, 7, 8], [4], list(range(9)), [1, 5])  # visible patches of four samples
STEPS = np.array([3, 1, 2, 3])


class Batch:
    """Samples of `STEPS` steps, as the loader gives them, each step's samples after the other's."""

    def __init__(self, history: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.history = history
        self.frames = torch.randint(0, 256, (4, history, 12, 12, 3), generator=generator, dtype=torch.uint8)
        self.targets = torch.randint(0, 256, (4, 3, 12, 12, 3), generator=generator, dtype=torch.uint8)
        self.actions = torch.randn(4, 3, ACTIONS, generator=generator, dtype=torch.float64)

    def arguments(self, samples: list[int], horizon: int = 3) -> tuple[Any, ...]:
        seen = [CONTEXT[i] for i in samples for _ in range(self.history)]
        context, lengths = np.array([p for one in seen for p in one]), np.array([len(one) for one in seen])
        rows = [(i, t) for t in range(horizon) for i in samples if STEPS[i] > t]
        target, action = (torch.stack([x[i, t] for i, t in rows]) for x in (self.targets, self.actions))
        later = later_steps(context, lengths, STEPS[samples], horizon, PATCHES)
        asked = every_patch(len(samples), PATCHES, "cpu")
        return self.frames[samples].flatten(0, 1), target, action, *pack(context, lengths), *asked, (), 1.0, later


def by_hand(plain: SimpleNamespace, model: IWM, batch: Batch) -> Tensor:
    """Return Σ‖prediction − target‖² over all steps that there are; gradients flow through what is fed back."""
    config, history = model.config, batch.history
    target = model.encoder if model.target_encoder is None else model.target_encoder
    world = plain.as_timm(dict(model.named_parameters()), "predictor.")
    total = torch.zeros((), dtype=torch.float64)
    for i, kept in enumerate(CONTEXT):
        window = [(plain.dense_encoder(model.encoder, frame, kept), kept) for frame in batch.frames[i]]
        for t in range(STEPS[i]):
            ages = [history - 1 - place for place, (_, patches) in enumerate(window) for _ in patches]
            read, patches = torch.cat([z for z, _ in window]), [p for _, patches in window for p in patches]
            got = plain.predictor(
                world, read, patches, list(range(9)), batch.actions[i, t], config.predictor.head_count, 3,
                ages if history > 1 else None,
            )  # fmt: skip
            wanted = plain.norm(plain.dense_encoder(target, batch.targets[i, t], list(range(9))).detach())
            total = total + ((got - wanted) ** 2).sum()
            window = [*window[1:], (got, list(range(9)))]
    return total


VARIANTS = {
    "one frame": nine_patches("feature+block"),
    "two frames": nine_patches("sequence", history=2),
    "four frames, shared target": nine_patches("block", history=4, target="shared"),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_every_gradient(plain: SimpleNamespace, config: ModelConfig, recompute: bool) -> None:
    model = plain.exact_model(config, ACTIONS, activation_checkpointing=recompute)
    batch = Batch(config.history)
    found = model(*batch.arguments([0, 1, 2, 3]))
    assert found.tokens == int(STEPS.sum()) * PATCHES
    expected = by_hand(plain, model, batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(found.loss, list(trained.values()))
    theirs = torch.autograd.grad(expected, list(trained.values()))
    for name, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)


def test_the_gradient_is_the_loss_s_slope(plain: SimpleNamespace) -> None:
    """Central differences along a random direction of all trained weights."""
    model, batch = plain.exact_model(nine_patches("feature", history=2), ACTIONS), Batch(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    arguments = batch.arguments([0, 1, 2, 3])
    slope = sum((g * w).sum() for g, w in zip(torch.autograd.grad(model(*arguments).loss, trained), ways, strict=True))
    losses = []
    with torch.no_grad():
        for by in (1e-6, -2e-6):
            torch._foreach_add_(trained, ways, alpha=by)
            losses.append(model(*arguments).loss)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, slope.detach(), rtol=1e-4, atol=0)


def test_samples_do_not_see_each_other_and_steps_that_nobody_has_add_nothing(plain: SimpleNamespace) -> None:
    model, batch = plain.exact_model(nine_patches("feature+block", history=2), ACTIONS), Batch(2)
    with torch.no_grad():
        whole = model(*batch.arguments([0, 1, 2, 3])).loss
        parts = [model(*batch.arguments(part)).loss for part in ([3, 0], [1], [2])]
        more = model(*batch.arguments([0, 1, 2, 3], horizon=5)).loss
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(more, whole)
    alone = model(*batch.arguments([1]))  # its second and third step are empty batches
    alone.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rows_that_do_not_fit_the_steps_are_refused(plain: SimpleNamespace) -> None:
    model, arguments = plain.exact_model(nine_patches("block"), ACTIONS), list(Batch(1).arguments([0, 1, 2, 3]))
    arguments[1] = arguments[1][:-1]
    with pytest.raises(ValueError, match=r"target has 8 rows and action 9; with later steps both must have 4 \+ 5"):
        model(*arguments)
