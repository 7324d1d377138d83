"""EMA update of many tensors, and of their rounded copies, in one kernel.

    average ← average + (1 − momentum) · (weight − average);   copy ← average

averages, weights and copies: equally many tensors, of any shapes, elementwise. Arithmetic is fp32, with the two forms
of `torch.lerp`.

Fused (Triton): one launch for all tensors, whose addresses are in a table on the device, built once for the same
tensors. It reads average and weight once and writes average and copy once: 14 bytes per element with a half-precision
copy, where a lerp followed by a copy moves 18. The compiler may contract a multiply and an add, so the average differs
from `torch._foreach_lerp_` by at most one rounding of the multiplication, 2⁻²⁴ · (1 − momentum) · |weight − average|,
and one of the result.

Reference (plain PyTorch, below): `torch._foreach_lerp_`, then `torch._foreach_copy_`.

FLOPs and bytes: `ema_update_flops`, `ema_update_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import resolve_backend
from ._lib.jit import to_type
from ._lib.rows import launching

__all__ = ["ema_update", "ema_update_bytes", "ema_update_flops", "ema_update_reference"]

# Elements per program: four 16-byte loads per lane, of average and of weight each.
_BLOCK = 2048


def ema_update_flops(elements: int) -> int:
    """Return FLOPs: difference, multiplication, sum."""
    return 3 * elements


def ema_update_bytes(elements: int, *, copy: int = 2) -> int:
    """Return minimum bytes moved: fp32 average and weight read once, average and copy written once.

    `copy`: bytes per element of a copy, 0 without copies.
    """
    return elements * (12 + copy)


def ema_update_reference(
    averages: Sequence[Tensor], weights: Sequence[Tensor], momentum: float, copies: Sequence[Tensor] | None = None,
    unless: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute `ema_update` with PyTorch's operators. Arguments are not checked."""
    if not averages:  # torch rejects empty lists
        return
    if unless is None:
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - momentum)
    else:
        step = torch.full_like(unless, 1.0 - momentum, dtype=averages[0].dtype).masked_fill_(unless != 0, 0.0)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, step)
    if copies:
        torch._foreach_copy_(list(copies), list(averages))


@triton.jit
@no_type_check
def average_kernel(
    average_ptr, weight_ptr, copy_ptr, table_ptr, unless_ptr,
    step,
    HAS_COPY: tl.constexpr, HAS_UNLESS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Update average += step · (weight − average), fp32, and copy = average; one table row per program.

    table int64 (programs, 4): offsets of its part of average, weight and copy, in elements from the pointers, which are
    those of the first tensor; and the elements left there. ALIGNED: all of these are multiples of 4. HAS_UNLESS: step
    is 0 if the fp32 at unless_ptr is not 0.
    """
    p_row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    average = tl.load(p_row)
    weight = tl.load(p_row + 1)
    left = tl.load(p_row + 3)
    if ALIGNED:
        average = tl.multiple_of(average, 4)
        weight = tl.multiple_of(weight, 4)
        left = tl.multiple_of(left, 4)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < left
    old = tl.load(average_ptr + average + o_n, mask=m_n, other=0.0)
    new = tl.load(weight_ptr + weight + o_n, mask=m_n, other=0.0)
    if HAS_UNLESS:
        step = tl.where(tl.load(unless_ptr) == 0.0, step, 0.0)
    # torch.lerp's two forms: each is exact at its end.
    value = tl.where(step < 0.5, old + step * (new - old), new - (new - old) * (1.0 - step))
    tl.store(average_ptr + average + o_n, value, mask=m_n)
    if HAS_COPY:
        copy = tl.load(p_row + 2)
        if ALIGNED:
            copy = tl.multiple_of(copy, 4)
        tl.store(copy_ptr + copy + o_n, to_type(value, copy_ptr.dtype.element_ty), mask=m_n)


def launch_average(
    averages: list[Tensor], weights: list[Tensor], copies: list[Tensor], step: float, unless: Tensor | None = None
) -> None:
    """Launch `average_kernel` once for all tensors; step is 1 − momentum; without copies the list is empty."""
    lengths = tuple(t.numel() for t in averages)
    if not any(lengths):
        return
    table, aligned = _table(lengths, _offsets(averages), _offsets(weights), _offsets(copies), averages[0].device)
    with launching(averages[0]):
        average_kernel[(table.shape[0],)](
            average_ptr=averages[0], weight_ptr=weights[0], copy_ptr=copies[0] if copies else None, table_ptr=table,
            unless_ptr=unless,
            step=step,
            HAS_COPY=bool(copies), HAS_UNLESS=unless is not None, ALIGNED=aligned,
            BLOCK_N=_BLOCK, num_warps=4,
        )  # fmt: skip


def _offsets(tensors: list[Tensor]) -> tuple[int, ...]:
    """Return each tensor's offset in elements from the first."""
    if not tensors:
        return ()
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    return tuple((t.data_ptr() - first) // size for t in tensors)


# Keyed by addresses, so that no other tensors match. A run has one set of them.
@lru_cache(maxsize=8)
def _table(
    lengths: tuple[int, ...], averages: tuple[int, ...], weights: tuple[int, ...], copies: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, bool]:  # fmt: skip
    """Return the table of `average_kernel`, and whether all of it is a multiple of 4."""
    elements = np.array(lengths)
    programs = -(-elements // _BLOCK)
    tensor = np.repeat(np.arange(len(elements)), programs)
    first = (np.arange(len(tensor)) - np.repeat(np.cumsum(programs) - programs, programs)) * _BLOCK
    begins = [np.array(places or (0,) * len(lengths))[tensor] + first for places in (averages, weights, copies)]
    table = np.stack([*begins, elements[tensor] - first], axis=1)
    return torch.from_numpy(table).to(device), not (table % 4).any()


@torch.library.custom_op("iwm_fast::ema_update_", mutates_args=("averages", "copies"))
def _operator(
    averages: list[Tensor], weights: list[Tensor], copies: list[Tensor], step: float, unless: Tensor | None = None
) -> None:
    """Move the averages by `step` towards the weights and write them to the copies, if any."""
    launch_average(averages, weights, copies, step, unless)


@register_flop_formula(torch.ops.iwm_fast.ema_update_)
def _count(averages: Any, *_: Any, **__: Any) -> int:
    return ema_update_flops(sum(math.prod(shape) for shape in averages))


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    momentum: float,
    copies: Sequence[Tensor] | None = None,
    *,
    unless: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update averages towards weights in place, and write the result to copies.

    Args:
        averages: float32 (or float64, then on the reference), contiguous, all on one device; may be empty. None shares
            memory with another, or with another's weight or copy. Nothing is recorded for autograd, even if tensors
            require gradients.
        weights: one per average, with its number of elements, dtype and device, contiguous.
        momentum: 0 to 1, the weight of the old average.
        copies: one per average, or None, or empty; all of one floating dtype, with the averages' elements and device,
            contiguous. Rounded to nearest.
        unless: one float32 on the averages' device, or None. If it is not 0, the averages stay unchanged and are
            copied. The host does not read it.
        backend: "auto" (Triton for float32 on CUDA), "reference" or "triton".

    Raises:
        ValueError: an argument does not fit, or "triton" is given and cannot run.

    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be in 0 to 1")
    copies = copies or ()
    for name, tensors in (("weights", weights), ("copies", copies)):
        if len(tensors) != len(averages) and (name == "weights" or tensors):
            raise ValueError(f"there are {len(tensors)} {name} and {len(averages)} averages; they must be as many")
    if not averages:
        return
    dtype = averages[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"averages[0] is {dtype}; averages need torch.float32 or wider: in less they would not move")
    _check("averages", averages, averages, dtype)
    _check("weights", weights, averages, dtype)
    if copies:
        if not copies[0].is_floating_point():
            raise ValueError(f"copies[0] is {copies[0].dtype}; it must be a floating type")
        _check("copies", copies, averages, copies[0].dtype)
    if unless is not None and (
        unless.numel() != 1 or unless.dtype != torch.float32 or unless.device != averages[0].device
    ):
        raise ValueError(
            f"unless is {tuple(unless.shape)}, {unless.dtype} on {unless.device}; it must be one torch.float32 on "
            f"{averages[0].device}"
        )
    _check_apart(averages, weights, copies)
    if resolve_backend(backend, "averages[0]", averages[0]) == "triton":
        torch.ops.iwm_fast.ema_update_(list(averages), list(weights), list(copies), 1.0 - momentum, unless)
    else:
        ema_update_reference(averages, weights, momentum, copies, unless)


def _check(name: str, tensors: Sequence[Tensor], averages: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Require contiguous tensors of one dtype, on one device, with as many elements as the averages."""
    device = averages[0].device
    for i, (tensor, average) in enumerate(zip(tensors, averages, strict=True)):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name}[{i}] is {tensor.dtype} on {tensor.device}; it must be {dtype} on {device}")
        if tensor.numel() != average.numel() or not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{i}] has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be contiguous, of "
                f"averages[{i}]'s {average.numel()} elements"
            )
        if name != "weights" and tensor.is_neg():
            raise ValueError(f"{name}[{i}] is a view of negated memory; give {name}[{i}].resolve_neg()")


def _check_apart(averages: Sequence[Tensor], weights: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Require that written tensors share no memory with others: programs run in any order."""
    if averages[0].device.type == "meta" or torch.compiler.is_compiling():
        return
    shared = _sharing(*(tuple((t.data_ptr(), t.nbytes) for t in tensors) for tensors in (averages, weights, copies)))
    if shared is not None:
        raise ValueError(
            f"{shared[0]} shares memory with {shared[1]}; a tensor that is written needs memory of its own"
        )


# Keyed by addresses, as `_table` is: the same tensors are checked once.
@lru_cache(maxsize=8)
def _sharing(*lists: tuple[tuple[int, int], ...]) -> tuple[str, str] | None:
    """Return the names of two tensors that share bytes, one of them written; an average may be its weight or copy."""
    names = ("averages", "weights", "copies")
    spans: dict[tuple[int, int, int], tuple[str, bool]] = {}  # (first byte, end, index) to (name, whether written)
    for name, tensors in zip(names, lists, strict=True):
        for i, (first, size) in enumerate(tensors):
            if size:
                key = (first, first + size, i)
                spans[key] = (f"{name}[{i}]", name != "weights" or (key in spans and spans[key][1]))
    read, written = (0, ""), (0, "")  # the furthest end so far of any tensor, and of a written one
    for (first, end, _), (name, is_written) in sorted(spans.items()):
        before = read if is_written else written
        if first < before[0]:
            return name, before[1]
        read = max(read, (end, name))
        written = max(written, (end, name)) if is_written else written
    return None
