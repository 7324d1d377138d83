"""Number of kernels that a PyTorch operator launches on CUDA, from its arguments.

Views and allocations launch none, other operators one. The exceptions, from ATen's CUDA sources (2.7 to 2.13):

- A copy between dense tensors of the same dtype and layout is a memcpy and launches none; nor does one from the host.
- ``cat`` and ``stack`` take 128 tensors per launch.
- ``_foreach_*`` and ``_fused_*`` cut tensors into chunks of 65,536 elements. A launch takes a limited number of tensors
  (fewer with more lists) and at most 320 chunks (ATen/native/cuda/MultiTensorApply.cuh). ``_foreach_norm`` first clears
  its partial results and adds them up at the end.
- A cuBLAS call counts as one.

`tools/nullgpu` counts real launches, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["multi_tensor_launches", "operator_launches"]

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
_COPIES = ("clone", "_to_copy", "copy_")
# Host bookkeeping, and reads of one value, which are copies.
_NONE = ("_local_scalar_dense", "_unsafe_view", "resize_", "set_", "record_stream")
_SEVERAL = {"repeat_interleave": 3, "native_layer_norm_backward": 2, "isinf": 2}
# In half precision; in fp32, where parts of the gradients get tensors of their own.
_EFFICIENT_BACKWARD = (2, 5)
_JOINED = 128
# Tensors whose norms one launch sums (400 before CUDA 13, 3,200 since).
_NORMS = 400
_CHUNK, _MOST_CHUNKS = 65_536, 320
# Tensors per launch by number of lists; the first if each tensor has its own scalar.
_MOST_TENSORS = (110, 64, 48, 36, 30)
_MOST_WITH_SCALARS = 96


def operator_launches(func: Any, args: Sequence[Any], out: Any) -> int:
    """Return the launches of one dispatched call: the operator, its arguments, and its output."""
    name: str = func.overloadpacket.__name__
    if func.namespace not in ("aten", "prims") or name in _ALLOCATIONS or name in _NONE or _is_view(func):
        return 0
    if name in _COPIES:
        source, made = (args[1], args[0]) if name == "copy_" else (args[0], out)
        return 0 if not made.numel() or _is_memory_copy(source, made) else 1
    if name in ("cat", "stack"):
        joined: Sequence[Tensor] = args[0]
        return -(-sum(t.numel() > 0 for t in joined) // _JOINED)
    if name.startswith(("_foreach_", "_fused_")):
        return _of_lists(name, args, out)
    if name == "_efficient_attention_backward":
        return _EFFICIENT_BACKWARD[args[0].dtype == torch.float32]
    results = [t for t in _tensors(out) if isinstance(t, Tensor)]
    if results and not any(t.numel() for t in results):
        return 0
    return _SEVERAL.get(name, 1)


def multi_tensor_launches(elements: Sequence[int], lists: int, *, scalars: bool = False) -> int:
    """Return the launches of ATen's ``multi_tensor_apply`` over tensors of these sizes, in 1 to 5 lists.

    ``scalars``: each tensor has its own scalar.
    """
    most = _MOST_WITH_SCALARS if scalars and lists == 1 else _MOST_TENSORS[lists - 1]
    launches = tensors = blocks = 0
    for size in elements:
        chunks = -(-size // _CHUNK)
        tensors += chunks > 0
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _MOST_CHUNKS or (last and tensors == most):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


def _of_lists(name: str, args: Sequence[Any], out: Any) -> int:
    """Launches of ``_foreach_*`` and ``_fused_*``, whose last list is the step counts and is not chunked."""
    given = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    sizes = [t.numel() for t in given[0]] if given else []
    if name == "_foreach_norm":
        chunked = multi_tensor_launches(sizes, 1)
        return 1 + chunked + -(-len(sizes) // _NORMS)
    if name.startswith("_fused_"):
        return multi_tensor_launches(sizes, len(given) - 1)
    scalars = any(isinstance(a, list | tuple) and a and not isinstance(a[0], Tensor) for a in args)
    written = 1 if isinstance(out, list | tuple) and out and not name.endswith("_") else 0
    return multi_tensor_launches(sizes, len(given) + written, scalars=scalars)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns  # noqa: SLF001  (torch has no public name for it)
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_memory_copy(source: Tensor, made: Tensor) -> bool:
    if source.device != made.device:
        return True
    alike = source.dtype == made.dtype and source.shape == made.shape and source.stride() == made.stride()
    return alike and _is_dense(source)


def _is_dense(x: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _tensors(out: Any) -> Iterator[Any]:
    yield from out if isinstance(out, list | tuple) else (out,)
