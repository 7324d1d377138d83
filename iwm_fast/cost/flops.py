"""Useful FLOPs of one training step, from the token counts of each image.

A multiply-add is two operations. Counted: the matmuls of linear layers and of attention (two, over an image's own
tokens, prefix tokens among them). Not counted, as usual for MFU: normalisation, GELU, softmax, rotations (rope),
residuals, optimizer, and recomputation (activation checkpointing, attention). The backward pass of a matmul is two
matmuls of its size, or one where its input needs no gradient (pixels, actions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iwm_fast import kernels
from iwm_fast.config.schema import EncoderArchitecture, ModelConfig

__all__ = ["StepFlops", "step_flops", "window_tokens"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step by part; `*_backward` without recomputation."""

    target_forward: int
    context_forward: int
    context_backward: int
    predictor_forward: int
    predictor_backward: int

    @property
    def total(self) -> int:
        """All of them."""
        return (
            self.target_forward
            + self.context_forward
            + self.context_backward
            + self.predictor_forward
            + self.predictor_backward
        )


@dataclass(frozen=True)
class _Count:
    """Forward FLOPs whose input needs a gradient, and those whose input needs none."""

    inner: int
    first: int = 0

    @property
    def forward(self) -> int:
        return self.inner + self.first

    @property
    def backward(self) -> int:
        return 2 * self.inner + self.first

    def __add__(self, other: _Count) -> _Count:
        return _Count(self.inner + other.inner, self.first + other.first)


def _block(width: int, ratio: float, lengths: np.ndarray, kept: int | None = None, actions: int = 0) -> _Count:
    """Attention within each image, its four projections, and the MLP; `kept`: tokens after the attention."""
    tokens = int(lengths.sum())
    kept = tokens if kept is None else kept
    mixing = 4 * width * int((lengths * lengths).sum())
    projections = 6 * tokens * width * width + 2 * kept * width * width
    return _Count(mixing + projections) + _mlp(width, ratio, kept, len(lengths), actions)


def _mlp(width: int, ratio: float, tokens: int, images: int, actions: int) -> _Count:
    hidden = round(width * ratio)
    whole = kernels.conditioned_mlp_flops(tokens, width, hidden, width, images=images, actions=actions)
    action = 2 * images * hidden * actions
    return _Count(whole - action, action)


def _encoder(architecture: EncoderArchitecture, lengths: np.ndarray, kept: int | None = None) -> _Count:
    """lengths: patches of each image; `kept`: tokens after the last attention, None: all patches."""
    shape, patch, patches = architecture.shape, architecture.patch, int(lengths.sum())
    count = _Count(0, 2 * patches * shape.width * patch * patch * 3)
    kept = patches if kept is None else kept
    for block in range(shape.depth):
        last = block == shape.depth - 1
        count += _block(shape.width, shape.mlp_ratio, lengths + architecture.prefix_tokens, kept if last else None)
    return count


def _embed(model: ModelConfig, products: int) -> _Count:
    """The predictor's first layer, whose input needs no gradient where the encoder is frozen."""
    return _Count(0, 2 * products) if model.freeze_encoder else _Count(2 * products)


def window_tokens(model: ModelConfig, context: np.ndarray, step: int) -> np.ndarray:
    """Return the tokens that the predictor reads of each source at a step of train.horizon, counted from 0: the frames
    that are left, of `context` visible patches each, and the predictions so far.
    """
    predicted = min(step, model.history)
    return context * (model.history - predicted) + predicted * model.grid**2


def _vit_predictor(
    model: ModelConfig, actions: int, context: np.ndarray, predicted: np.ndarray, *, fed_back: bool = False
) -> _Count:
    config, given, outer = model.predictor, model.encoder_shape.width, model.target_architecture.shape.width
    width, images, kinds = config.width, len(context), config.conditioning.split("+")
    asked = int(predicted.sum())
    joined = context + predicted + (actions if "sequence" in kinds else 0)
    in_blocks = actions if "block" in kinds else 0
    embed = int(context.sum()) * given * width
    count = (_Count(2 * embed) if fed_back else _embed(model, embed)) + _Count(2 * asked * width * outer)
    if "feature" in kinds:
        count += _Count(6 * asked * width * width, 2 * images * width * actions)
    for block in range(config.depth):
        # The last block computes only the predicted tokens after its attention.
        count += _block(width, config.mlp_ratio, joined, asked if block == config.depth - 1 else None, in_blocks)
    return count


def _mlp_predictor(model: ModelConfig, actions: int, context: np.ndarray) -> _Count:
    config, given, outer = model.predictor, model.encoder_shape.width, model.target_architecture.shape.width
    tokens, images = int(context.sum()), len(context)
    in_blocks = 0 if config.conditioning == "none" else actions
    count = _embed(model, tokens * given * config.width) + _Count(2 * tokens * outer * config.width)
    for _ in range(config.depth):
        count += _mlp(config.width, config.mlp_ratio, tokens, images, in_blocks)
    return count


def step_flops(
    model: ModelConfig,
    action_dim: int,
    context_lengths: Sequence[int] | np.ndarray,
    predicted_lengths: Sequence[int] | np.ndarray,
    sources: int = 1,
    steps: Sequence[int] | np.ndarray | None = None,
) -> StepFlops:
    """Return the FLOPs of one step over the sources with these token counts.

    Args:
        model: the networks.
        action_dim: A, components of an action.
        context_lengths: (B · K,), visible patches of each source, in each of its frames (`model.history`).
        predicted_lengths: (B · K,), patches to predict for each source; unused with the mlp predictor, which
            predicts the context's.
        sources: K, per target.
        steps: (B,), the steps of each source, with train.horizon above 1: then all patches are predicted, and
            predicted_lengths are unused.

    Raises:
        ValueError: the two do not have one entry per source, or are no multiple of K.

    """
    context = np.asarray(context_lengths, dtype=np.int64)
    predicted = np.asarray(predicted_lengths, dtype=np.int64)
    if context.ndim != 1 or context.shape != predicted.shape:
        raise ValueError(
            f"predicted_lengths has shape {predicted.shape}; it must be context_lengths' shape (B,) = {context.shape}"
        )
    if len(context) % sources:
        raise ValueError(f"context_lengths has {len(context)} entries; it must be a multiple of sources ({sources})")
    asked = context if model.predictor.kind == "mlp" else predicted
    whole = np.full(len(context) // sources, model.grid**2, dtype=np.int64)
    if steps is not None:
        had = np.asarray(steps, dtype=np.int64)
        asked = whole
        whole = np.repeat(whole, had)
    target = _encoder(model.target_architecture, whole, int(asked.sum()) if sources == 1 and steps is None else None)
    encoder = _encoder(model.architecture, np.repeat(context, model.history))
    if model.predictor.kind == "mlp":
        predictor = _mlp_predictor(model, action_dim, context)
    else:
        predictor = _vit_predictor(model, action_dim, context * model.history, asked)
    for step in range(1, int(had.max()) if steps is not None else 1):
        going = had > step
        read = window_tokens(model, context[going], step)
        predictor += _vit_predictor(model, action_dim, read, asked[going], fed_back=True)
    context_backward = 0 if model.freeze_encoder else encoder.backward
    return StepFlops(target.forward, encoder.forward, context_backward, predictor.forward, predictor.backward)
