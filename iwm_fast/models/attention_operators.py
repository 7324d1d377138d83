"""Packed attention of optional libraries: why each cannot run here, and how to call it.

All take packed q, k and v (N, heads, d) and `Segments`, and return (N, heads, d). Images without a token have no
segment. `attention` chooses among them, and calls xformers and PyTorch's SDPA itself.

Backward passes, according to the libraries' sources: flash-attention sums the gradient of q with atomics, in an order
that changes between runs; a deterministic mode costs some time and memory. PyTorch's version reads
`torch.use_deterministic_algorithms`; the packages have an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from iwm_fast.models.packing import Segments

__all__ = ["HALVES", "OPERATORS", "Operator", "library"]

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operator:
    """A library's packed attention, in bf16 and fp16 on a GPU.

    module, name: of the function. where: the library's name for people. since: the lowest compute capability.
    """

    module: str
    name: str
    where: str
    since: tuple[int, int]
    call: Callable[[Any, Tensor, Tensor, Tensor, Tensor, int], Any]

    def missing(self, device: str) -> str | None:
        """Return why it cannot run on a device's type, to follow "which"; None where it can."""
        if device != "cuda":
            return f"has no operator for {device}"
        if library(self.module, self.name) is None:
            return f"needs {self.where}, which is not installed"
        found = torch.cuda.get_device_capability()
        if found < self.since:
            needed, has = (".".join(map(str, version)) for version in (self.since, found))
            return f"needs a GPU of compute capability {needed}; this one has {has}"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """Return softmax(q kᵀ / √d) v within each image."""
        function = library(self.module, self.name)
        if function is None:
            raise ValueError(f"{self.where} is not installed")
        out = self.call(function, q, k, v, segments.filled_bounds, segments.longest)
        attended: Tensor = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp
        return attended


@cache
def library(module: str, name: str) -> Callable[..., Any] | None:
    """Return a library's function, or None where it is not installed or has another version."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _varlen(function: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Any:
    return function(q, k, v, bounds, bounds, longest, longest)


def _flash(function: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Any:
    return function(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


OPERATORS = {
    "varlen": Operator(
        "torch.nn.attention.varlen", "varlen_attn", "torch 2.10 or later (torch.nn.attention.varlen)", (8, 0), _varlen
    ),
    "flash3": Operator(
        "flash_attn_interface", "flash_attn_varlen_func", "flash-attn 3 (flash_attn_interface)", (9, 0), _flash
    ),
    "flash_cute": Operator(
        "flash_attn.cute.interface", "flash_attn_varlen_func", "flash-attn's CuTe (flash_attn.cute)", (9, 0), _flash
    ),
}
