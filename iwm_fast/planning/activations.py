"""Bytes that the forward pass keeps for the backward pass, from the packed token counts.

A block of width D keeps, of each token, its input, the normalised input, q, k, v, the attention's result and the MLP's
input: 7·D numbers, and one log-sum-exp a head in fp32. The MLP's hidden, 4·D or so, and a normalisation's statistics
are made again by the kernels; the plain PyTorch operators of the CPU keep them, the hidden's GELU and the MLP's
normalised input (`hidden_kept`). With activation checkpointing a block keeps its input alone, and one block at a time
is made again.
"""

from __future__ import annotations

from dataclasses import dataclass

from iwm_fast.config import Config
from iwm_fast.planning.actions import action_dim
from iwm_fast.planning.tokens import Tokens

__all__ = ["Activations", "activations"]

_STATISTICS = 8  # bytes a token: mean and reciprocal deviation in fp32
_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Activations:
    """kept: bytes held for the backward pass. passing: the most that a step needs for moments beside it."""

    kept: int
    passing: int


@dataclass(frozen=True)
class _Form:
    element: int
    hidden_kept: bool

    def norm(self, tokens: int, width: int) -> int:
        return tokens * (width * self.element + _STATISTICS)

    def mlp(self, tokens: int, hidden: int) -> int:
        """What `conditioned_mlp` keeps beside its input."""
        return tokens * 2 * hidden * self.element if self.hidden_kept else 0

    def block(self, tokens: int, width: int, heads: int, hidden: int, kept: int | None = None) -> int:
        """A transformer block; only `kept` tokens, then copied out, go on after its attention."""
        attention = tokens * (6 * width * self.element + 4 * heads)
        attention += tokens * _STATISTICS if self.hidden_kept else 0
        if kept is None:
            kept = tokens
        else:
            attention += kept * width * self.element
        into_mlp = self.norm(kept, width) if self.hidden_kept else 0
        return attention + into_mlp + kept * width * self.element + self.mlp(kept, hidden)


def activations(config: Config, tokens: Tokens, *, hidden_kept: bool = False) -> Activations:
    """Of one micro-batch whose images have these token counts."""
    form = _Form(2 if config.train.precision == "bf16" else 4, hidden_kept)
    encoder, encoder_block = _encoder(config, form, int(tokens.context.sum()))
    predictor, predictor_block = _predictor(config, form, tokens)
    # The loss kernel keeps the target's tokens too.
    target = int(tokens.predicted.sum()) * config.model.encoder_shape.width * form.element
    kept = encoder + predictor + (0 if hidden_kept else target)
    # Backward through a block holds about as much again as it kept: the gradients of the same tensors.
    return Activations(kept, max(encoder_block, predictor_block))


def _encoder(config: Config, form: _Form, tokens: int) -> tuple[int, int]:
    shape, patch = config.model.encoder_shape, config.model.patch
    block = form.block(tokens, shape.width, shape.heads, round(shape.width * shape.mlp_ratio))
    pixels = tokens * 3 * patch * patch * form.element
    kept = tokens * shape.width * form.element if config.train.activation_checkpointing else block
    return pixels + shape.depth * kept + form.norm(tokens, shape.width), block


def _predictor(config: Config, form: _Form, tokens: Tokens) -> tuple[int, int]:
    predictor, outer, e = config.model.predictor, config.model.encoder_shape.width, form.element
    width, hidden = predictor.width, round(predictor.width * predictor.mlp_ratio)
    seen, asked = int(tokens.context.sum()), int(tokens.predicted.sum())
    recompute = config.train.activation_checkpointing
    ends = seen * outer * e + form.norm(asked, width) + asked * width * e + asked * outer * e  # in, out, loss
    if predictor.kind == "mlp":
        block = (form.norm(seen, width) if form.hidden_kept else 0) + seen * width * e + form.mlp(seen, hidden)
        return ends + predictor.depth * (seen * width * e if recompute else block), block
    kinds = predictor.conditioning.split("+")
    actions = action_dim(config.actions)
    joined = seen + asked + (len(tokens.context) * actions if "sequence" in kinds else 0)
    block = form.block(joined, width, predictor.head_count, hidden)
    last = form.block(joined, width, predictor.head_count, hidden, asked)
    blocks = predictor.depth * joined * width * e if recompute else (predictor.depth - 1) * block + last
    if "feature" in kinds:
        ends += 3 * asked * width * e + form.mlp(asked, width)
    return ends + blocks + joined * 2 * _INDEX, block
