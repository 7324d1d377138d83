"""Fixed positions of patches on a square grid: sines and cosines that are added, and rotations of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Rotation", "rotation_table", "sincos_positions"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of packed tokens' queries and keys (`kernels.rope`).

    table: (L, d), cosines and sines of each patch's angles. patches: int64 (N,), each token's patch; −1: a prefix
    token, which is not rotated.
    """

    table: Tensor
    patches: Tensor


@cache  # cached forever: a CUDA graph reads it in place
def rotation_table(grid: int, head: int, base: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (grid · grid, head): cosines of each patch's head / 2 angles, then their sines; DINOv3's.

    An angle is 2π · c / base^(4k / head), k < head / 4, of the coordinate c of the patch's centre in [−1, 1]: first of
    its row, then of its column. No buffer of a module, which a cast to bf16 would round.
    """
    with torch.inference_mode(False):  # or the first one to ask would decide whether it can be trained with
        period = base ** (4 * torch.arange(head // 4, dtype=torch.float64, device="cpu") / head)
        centre = 2 * (torch.arange(grid, dtype=torch.float64, device="cpu") + 0.5) / grid - 1
        angle = 2 * math.pi * centre[:, None] / period  # (grid, head / 4)
        row, column = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
        both = torch.cat([row, column], dim=2).reshape(grid * grid, head // 2)
        return torch.cat([both.cos(), both.sin()], dim=1).to(dtype).to(device)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Return fp32 (grid · grid, width): one row per patch, row-major.

    The first half of the width encodes the column, the second the row; each half is [sin, cos] of the coordinate times
    10000^(−2k/half), as in MAE and I-JEPA.

    Raises:
        ValueError: width is not a multiple of four.

    """
    if width % 4:
        raise ValueError(f"width is {width}; it must be a multiple of 4")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # (grid, quarter)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    column = axis[None].expand(grid, -1, -1)
    row = axis[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()
