"""Task heads on tokens: linear and attentive, for a whole image and for each patch.

Shapes as in the package: B images, L patches, D token width; C classes, G patches along a side (L = G · G).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from iwm_fast.models.blocks import NORM_EPS, Block, ConditionedMlp, Norm, initialise_linear
from iwm_fast.models.packing import Segments

__all__ = ["AttentiveHead", "AttentivePool", "DenseHead", "LinearHead"]


class AttentivePool(nn.Module):
    """A learned query attends to all tokens of an image: pre-norm cross-attention, then an MLP, both residual.

    V-JEPA's attentive probe (facebookresearch/jepa, ``AttentivePooler`` with one query and a complete block, after CAE
    and AIM). With one query for all images the key and value projections need not touch each token: qᵀ(W_k x) = (W_kᵀ
    q)ᵀ x and Σ aᵢ W_v xᵢ = W_v Σ aᵢ xᵢ, 2 · heads · D multiplications per token instead of 2 · D². A bias of the keys
    would add the same number to all tokens of a head, so there is none.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}; it must be a multiple of heads, {heads}")
        self.heads = heads
        self.norm = Norm(width)
        self.query = nn.Parameter(torch.empty(width))
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.mlp = ConditionedMlp(width, round(width * mlp_ratio))
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.q, self.v, self.proj):
            initialise_linear(linear)
        nn.init.xavier_uniform_(self.k.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to (B, D)."""
        x = self.norm(tokens)
        query = self.q(self.query).unflatten(0, (self.heads, -1))  # (H, d)
        asked = torch.einsum("hd,hdw->hw", query, self.k.weight.unflatten(0, (self.heads, -1)))  # (H, D)
        scores = x @ asked.T * (1 / math.sqrt(query.shape[1]))  # (B, L, H)
        share = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=1).to(x.dtype)
        seen = share.transpose(1, 2) @ x  # (B, H, D)
        value = torch.einsum("bhw,hdw->bhd", seen, self.v.weight.unflatten(0, (self.heads, -1))).flatten(1)
        pooled = self.query + self.proj(value + self.v.bias)
        return self.mlp(pooled, Segments.uniform(len(tokens), 1, tokens.device).cu_seqlens)


class AttentiveHead(nn.Module):
    """Classify an image by an `AttentivePool` of its tokens and a linear layer."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.pool = AttentivePool(width, heads)
        self.out = nn.Linear(width, classes)
        _begin(self.out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to logits (B, C)."""
        return self.out(self.pool(tokens))


class LinearHead(nn.Module):
    """Classify an image by its mean token, standardised by batch statistics, as MAE's and I-JEPA's linear probe: batch
    normalisation without affine, then a linear layer.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        self.out = nn.Linear(width, classes)
        _begin(self.out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to logits (B, C)."""
        return self.out(self.norm(tokens.mean(dim=1)))


class DenseHead(nn.Module):
    """Classify each patch by a linear layer after batch normalisation without affine, as DINOv2's segmentation probe.

    ``heads`` above 0 adds a transformer block before it, in which patches attend to each other: the attentive form.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.block = Block(width, heads, 4.0, "auto") if heads else None
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        self.out = nn.Linear(width, classes)
        _begin(self.out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to logits (B, C, G, G)."""
        images, patches, _ = tokens.shape
        grid = math.isqrt(patches)
        x = tokens.flatten(0, 1)
        if self.block is not None:
            x = self.block(x, Segments.uniform(images, patches, x.device))
        logits = self.out(self.norm(x))  # (B · L, C)
        return logits.unflatten(0, (images, grid, grid)).permute(0, 3, 1, 2)


def _begin(linear: nn.Linear) -> None:
    """Initialise with small weights and no bias: the first logits are nearly equal for all classes (MAE's
    linear probe).
    """
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
