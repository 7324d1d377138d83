"""Positions on another grid and patch embeddings of another side, by the rules of the families' own implementations.

| rule | of |
|---|---|
| antialiased bicubic | timm; DINOv2 with registers |
| bicubic | ViTModel, ViTMAEModel, IJepaModel and Dinov2Model of transformers; MAE |
| bicubic with an offset of 0.1 | DINOv2's own code, whose scale is (new + 0.1) / old |
| sin-cos | I-JEPA's own code, which makes the table anew |
| pseudo-inverse (patches) | timm: weights that answer a resized patch as the old ones the patch (arXiv:2212.08013) |
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.families.converted import PositionRule
from iwm_fast.models.positions import sincos_positions

__all__ = ["resample_patches", "resize_positions", "side_of"]


def side_of(positions: int) -> int | None:
    """Return the side of a square grid of so many positions, or None."""
    side = math.isqrt(positions)
    return side if side * side == positions else None


def resize_positions(positions: Tensor, grid: int, rule: PositionRule) -> Tensor:
    """Return positions (L, D) of a square grid on another, (grid², D), in fp32. ValueError for a rule that has none."""
    side = side_of(len(positions))
    if side is None:
        raise ValueError(f"positions are {len(positions)}, no square")
    if side == grid:
        return positions.float()
    if rule == "sin-cos":
        return sincos_positions(positions.shape[1], grid)
    plane = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "antialiased bicubic":
        plane = F.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
    elif rule == "bicubic":
        plane = F.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False)
    elif rule == "bicubic with an offset of 0.1":
        scale = (grid + 0.1) / side
        plane = F.interpolate(plane, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    else:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(PositionRule)[:-1])}")
    return plane.permute(0, 2, 3, 1).reshape(grid * grid, -1)


def resample_patches(weight: Tensor, patch: int) -> Tensor:
    """Return a patch embedding (D, 3, p, p) for patches of another side, in fp32: W⁺ = W · R⁺, where R resizes a patch
    bicubically and R⁺ is its pseudo-inverse.
    """
    old = weight.shape[-1]
    if old == patch:
        return weight.float()
    pixels = torch.eye(old * old).view(old * old, 1, old, old)
    resized = F.interpolate(pixels, size=(patch, patch), mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1).T)  # (old², patch²)
    resampled: Tensor = (weight.float().flatten(2) @ inverse).unflatten(2, (patch, patch))
    return resampled
