"""Fixed sine-cosine positions of patches on a square grid."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sincos_positions"]


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
