"""Transformer blocks over packed tokens, and their initialisation.

A module that passes its weights to an operator of `iwm_fast.kernels` owns them as direct parameters, because ZeRO stage
3 gathers only the parameters of the module whose forward is running. So a block's second normalisation and both linear
layers live in `ConditionedMlp` under the operator's names; `export_names` maps them to timm's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwm_fast import kernels
from iwm_fast.models.attention import Attention
from iwm_fast.models.packing import Segments
from iwm_fast.models.positions import Rotation

__all__ = [
    "NORM_EPS",
    "Block",
    "ConditionedMlp",
    "Kept",
    "LimitedMlp",
    "Norm",
    "initialise_linear",
    "layer_norm_rows",
    "limit_workspace",
    "rescale_blocks",
    "run_blocks",
    "wants_groups",
]

NORM_EPS = 1e-6


class Norm(nn.LayerNorm):
    """Layer normalisation with fp32 statistics for any token type (as PyTorch's), and this project's eps."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__(width, eps=eps)


class StreamNorm(nn.Module):
    """Return (x, LN(x)), whose backward pass adds both gradients in one kernel."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (N, D) to x and LN(x)."""
        return kernels.residual_norm(x, None, self.weight, self.bias, eps=self.eps)


class LimitedMlp(nn.Module):
    """A module that calls `conditioned_mlp`. workspace: its limit in bytes, None for the process's."""

    workspace: int | None = None


def limit_workspace(module: nn.Module, size: int) -> None:
    """Give every `LimitedMlp` in the module `size` bytes for its hidden activations."""
    for part in module.modules():
        if isinstance(part, LimitedMlp):
            part.workspace = size


class ConditionedMlp(LimitedMlp):
    """x + MLP(LN(x)) in one operator, with the action as a bias per image where `actions` is above 0."""

    def __init__(self, width: int, hidden: int, actions: int = 0, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.w_in = nn.Parameter(torch.empty(hidden, width))
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(torch.empty(width, hidden))
        self.b_out = nn.Parameter(torch.zeros(width))
        # Zero at first: training starts from the unconditioned network.
        self.w_action = nn.Parameter(torch.zeros(hidden, actions)) if actions else None
        nn.init.xavier_uniform_(self.w_in)
        nn.init.xavier_uniform_(self.w_out)

    def forward(self, x: Tensor, cu_seqlens: Tensor, action: Tensor | None = None) -> Tensor:
        """Map x (N, D) packed and action (B, A) to (N, D). A module without `w_action` ignores the action.

        cu_seqlens: int32 (B + 1,), of the N tokens' `Segments`.
        """
        conditioned = self.w_action is not None
        return kernels.conditioned_mlp(
            x,
            self.w_in,
            self.b_in,
            self.w_out,
            self.b_out,
            action=action if conditioned else None,
            w_action=self.w_action,
            cu_seqlens=cu_seqlens if conditioned else None,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            residual=True,
            eps=self.eps,
            workspace=self.workspace,
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that the last block computes after its attention; nothing reads the others.

    rows: int64 (Nk,), of the block's tokens, in any order; segments: of the Nk; action: (B, A), of the same images, or
    None where the block is not conditioned on it.
    """

    rows: Tensor
    segments: Segments
    action: Tensor | None = None


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, attention: str, actions: int = 0, eps: float = NORM_EPS
    ) -> None:
        super().__init__()
        self.norm1 = StreamNorm(width, eps)
        self.attn = Attention(width, heads, attention)
        self.mlp = ConditionedMlp(width, round(width * mlp_ratio), actions, eps)
        for linear in (self.attn.qkv, self.attn.proj):
            initialise_linear(linear)

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        action: Tensor | None = None,
        kept: Kept | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Map x (N, D) packed and action (B, A) to (N, D), or to (Nk, D) with `kept`; rotation: of the N tokens."""
        x, qkv = self.before(x)
        mixed = self.attn(qkv, segments, rotation)
        if kept is None:
            return self.after(x, mixed, segments.cu_seqlens, action)
        return self.after(x, mixed, kept.segments.cu_seqlens, kept.action, kept.rows)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, qkv): the residual stream (N, D), and queries, keys and values (N, 3 · D) for the attention."""
        x, normed = self.norm1(x)
        return x, self.attn.qkv(normed)

    def after(
        self, x: Tensor, mixed: Tensor, cu_seqlens: Tensor, action: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """Return the block's output after the attention, for the tokens `rows`, int64 (Nk,), in segments cu_seqlens;
        None: for all.
        """
        if rows is not None:
            x, mixed = x.index_select(0, rows), mixed.index_select(0, rows)
        return self.mlp(x + self.attn.proj(mixed), cu_seqlens, action)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    segments: Segments | Tensor,
    action: Tensor | None = None,
    *,
    kept: Kept | None = None,
    rotation: Rotation | None = None,
    recompute: bool = False,
) -> Tensor:
    """Apply all blocks to x; with `recompute` only each block's input is saved for the backward pass.

    segments: as the blocks take them, `Segments`, or cu_seqlens for `ConditionedMlp`. `kept` is for the last block.
    With it or with `rotation` blocks must be `Block`s.
    """
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        arguments: tuple[Any, ...] = (x, segments, action)
        if rotation is not None or (kept is not None and i == last):
            arguments = (*arguments, kept if i == last else None, rotation)
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(*arguments)
    return x


def wants_groups(blocks: nn.ModuleList, segments: Segments) -> bool:
    """Return whether the blocks' attention runs one call per length, as the CPU's does; all blocks agree."""
    first = next((block for block in blocks if isinstance(block, Block)), None)
    return first is not None and first.attn.wants_groups(segments)


def initialise_linear(linear: nn.Linear) -> None:
    """Initialise with Xavier's uniform and no bias, as MAE.

    I-JEPA's fixed std of 0.02 is about the same at ViT-B's width. At widths of 100 to 200 and small patches it is a
    third of it or less: tokens then hold their position and little of the image, and the target hardly leaves that.
    """
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


@torch.no_grad()
def rescale_blocks(blocks: nn.ModuleList) -> None:
    """Divide the weights that write to the residual stream by √(2 · layer), counted from 1, as I-JEPA."""
    for layer, block in enumerate(blocks, start=1):
        factor = math.sqrt(2.0 * layer)
        if isinstance(block, Block):
            block.attn.proj.weight.div_(factor)
            block.mlp.w_out.div_(factor)
        elif isinstance(block, ConditionedMlp):
            block.w_out.div_(factor)


def layer_norm_rows(x: Tensor) -> Tensor:
    """Layer normalisation without affine over the last dimension, in fp32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
