"""Operands of the MLP's matmul launchers: bias, descriptors, grid, precision.

All tensors are on one device, with contiguous rows (`rows_together`). These launchers allocate only what they return,
and the slices of a weight gradient. Every reduction has a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from iwm_fast.kernels._tuning.candidates import PROCESSORS

__all__ = [
    "BLOCK_A",
    "GROUP",
    "TRITON_TYPES",
    "Bias",
    "activation_kind",
    "describable",
    "descriptor",
    "grid_of",
    "image_bias",
    "layout_of",
    "precision",
    "processors",
    "takes_action",
]

# Programs that run at the same time share this many rows of blocks in L2 (Triton's matmul tutorial, 6 to 8).
GROUP = 8
# Depth of the matmul that adds an action: one tensor core instruction.
BLOCK_A = 16
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Bias:
    """A term added to each row in the matmul: `row` (M,) of any floating dtype or, with image, fp32 (images, M).

    image: int32 (N,), each row's image. action (images, A) and w_action (M, A): their matmul is added too.
    """

    row: Tensor
    image: Tensor | None = None
    action: Tensor | None = None
    w_action: Tensor | None = None

    @property
    def kind(self) -> str:
        """Return its name in the tuner's key."""
        if self.action is not None:
            return "action"
        return "row" if self.image is None else "image"

    def rows(self, part: slice) -> Bias:
        """Return the bias of some of the rows."""
        return Bias(self.row, None if self.image is None else self.image[part], self.action, self.w_action)


def takes_action(action: Tensor) -> bool:
    """Return whether the kernels multiply the action themselves: at most 16 components, in half precision."""
    return action.shape[1] <= BLOCK_A and action.element_size() == 2


def activation_kind(activation: str | None, dtype: torch.dtype) -> str:
    """Return the kernels' name of an activation for results of a dtype: an approximation if that loses nothing."""
    if activation is None:
        return "none"
    if activation == "gelu":
        return "erf" if dtype == torch.float32 else "rational"
    return "tanh_approx" if dtype == torch.bfloat16 else "tanh"


def precision() -> str:
    """Return how fp32 operands are multiplied, from torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@cache
def processors(device: torch.device) -> int:
    """Return the SMs; while launches are recorded an H100's or H200's, and few in the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS["sm_90"] if device.type == "meta" else 2


def describable(*tensors: Tensor | None) -> bool:
    """Return whether tensor descriptors can address all matrices: rows and addresses are multiples of 16 bytes."""
    return all(
        t is None
        or (
            t.stride(-1) == 1
            and t.stride(0) >= t.shape[1]
            and t.stride(0) * t.element_size() % 16 == 0
            and t.data_ptr() % 16 == 0
        )
        for t in tensors
    )


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


def layout_of(*tensors: Tensor | None) -> str:
    return "tma" if describable(*tensors) else "any"


def grid_of(device: torch.device, tiles: int, *, persistent: bool) -> int:
    return min(tiles, processors(device)) if persistent else tiles


def image_bias(b_in: Tensor, action: Tensor, w_action: Tensor) -> Tensor:
    """Return b_in + action · w_actionᵀ, fp32 (images, M)."""
    return torch.addmm(b_in.float(), action.float(), w_action.float().t())
