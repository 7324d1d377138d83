"""Check that a baseline computes what iwm-fast does: load its weights into iwm-fast's networks and compare results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Inputs, Masks, Shape, normalised
from iwm_fast.benchmarks.adapters.ours import forward_backward
from iwm_fast.benchmarks.adapters.plain import plain_batch, plain_shape, plain_state
from iwm_fast.benchmarks.adapters.timm_vit import TimmJepa
from iwm_fast.benchmarks.baselines.plain_step import PlainIWM
from iwm_fast.export.timm_names import from_timm
from iwm_fast.models import IWM, Segments

__all__ = ["TOLERANCE", "ijepa_difference", "plain_difference", "timm_difference"]

# ‖theirs − ours‖ / ‖ours‖ in fp32. Another order of sums gives 1e-6; another epsilon, activation or position 1e-3.
TOLERANCE = 1e-4


def _few(inputs: Inputs, blocks: int) -> Inputs:
    """Two images and some of the blocks. A dense predictor predicts block by block, so one block is its own union."""
    masks = inputs.masks
    return Inputs(
        inputs.source[:2], inputs.target[:2], inputs.action[:2],
        Masks(masks.context[:2], masks.blocks[:blocks, :2], masks.drawn[:2]),
    )  # fmt: skip


def _difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.flatten() - ours.flatten()).norm() / ours.norm())


@torch.no_grad()
def _ours(
    shape: Shape, inputs: Inputs, encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return encoded context and predicted block, packed, of an unconditioned iwm-fast model with these weights."""
    model = IWM(shape.config("none", bf16=False).model, inputs.action.shape[1])
    model.encoder.load_state_dict(from_timm(encoder))
    model.predictor.load_state_dict(from_timm(predictor))
    patches = inputs.masks.patch_sets()
    context, asked = (torch.from_numpy(rows) for rows in (patches.context, patches.target))
    seen = Segments.from_lengths(patches.context_lengths)
    z = model.encoder(inputs.target, context, seen)
    return z, model.predictor(z, context, seen, asked, Segments.from_lengths(patches.target_lengths), inputs.action)


@torch.no_grad()
def ijepa_difference(checkout: Checkout, shape: Shape, inputs: Inputs) -> float:
    """Return the larger difference of its encoder on masked images and its predictor on one block."""
    few = _few(inputs, 1)
    encoder, predictor = checkout.networks(shape, torch.device("cpu"))
    state = {name.removeprefix("predictor_"): value for name, value in predictor.state_dict().items()}
    del state["pos_embed"]
    state["mask_token"] = state["mask_token"].flatten()
    ours = _ours(shape, few, encoder.state_dict(), state)
    context, blocks = [torch.from_numpy(few.masks.context)], [torch.from_numpy(few.masks.blocks[0])]
    z = encoder(normalised(few.target), context)
    # Its predictor adds positions to its input in place.
    return max(_difference(z, ours[0]), _difference(predictor(z.clone(), context, blocks), ours[1]))


@torch.no_grad()
def timm_difference(shape: Shape, inputs: Inputs) -> float:
    """`ijepa_difference` for timm's parts."""
    few, model = _few(inputs, 1), TimmJepa(shape)
    own = ("encoder.", "target.", "position")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    ours = _ours(shape, few, model.encoder.state_dict(), state)
    context, blocks = (torch.from_numpy(rows) for rows in (few.masks.context, few.masks.blocks))
    z = model.encode(normalised(few.target), context)
    return max(_difference(z, ours[0]), _difference(model.predict(z, context, blocks), ours[1]))


def plain_difference(shape: Shape, inputs: Inputs) -> float:
    """Return the larger difference of the plain step's loss and its gradient of the encoder's patch embedding."""
    few, device = _few(inputs, len(inputs.masks.blocks)), torch.device("cpu")
    ours = IWM(shape.config("feature", bf16=False).model, inputs.action.shape[1])
    plain = PlainIWM(plain_shape(shape, inputs.action.shape[1]))
    plain.load_state_dict(plain_state(ours.state_dict()))
    wanted = forward_backward(ours, few)
    found = plain(plain_batch(few, device))
    found.backward()
    theirs, own = plain.encoder.patch_embed.weight.grad, ours.encoder.patch_embed.proj.weight.grad
    assert theirs is not None
    assert own is not None
    return max(_difference(found.detach(), wanted.detach()), _difference(theirs, own))
