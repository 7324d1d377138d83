"""How many kernels an operator of PyTorch launches on CUDA, told by its arguments.

Almost every operator that is no view and no allocation launches one. The others, of ATen's CUDA sources (2.7 to 2.13):

- A copy between dense tensors of one type and one layout is a memory copy and launches none; one from the host neither.
- ``cat`` and ``stack`` take 128 tensors a launch.
- ``_foreach_*`` and ``_fused_*`` cut tensors into chunks of 65,536 elements and take as many tensors (fewer the more
  lists there are) and at most 320 chunks a launch (ATen/native/cuda/MultiTensorApply.cuh). ``_foreach_norm`` clears its
  partial results first and adds them afterwards.
- A call of cuBLAS counts as one.

`tools/nullgpu` counts the launches themselves, and a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["multi_tensor_launches", "operator_launches"]

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted")
_COPIES = ("clone", "_to_copy", "copy_")
# Bookkeeping of the host, and reads of one value, which are copies.
_NONE = ("_local_scalar_dense", "_unsafe_view", "resize_", "set_", "record_stream")
_SEVERAL = {"repeat_interleave": 3, "native_layer_norm_backward": 2, "isinf": 2}
# In half precision, and in fp32, where parts of the gradients are made in tensors of their own.
_EFFICIENT_BACKWARD = (2, 5)
_JOINED = 128
# Tensors whose norms one launch adds up (400 before CUDA 13, 3,200 since).
_NORMS = 400
_CHUNK, _MOST_CHUNKS = 65_536, 320
# Tensors of a launch by the number of lists; the first where each tensor has a scalar of its own.
_MOST_TENSORS = (110, 64, 48, 36, 30)
_MOST_WITH_SCALARS = 96


def operator_launches(func: Any, args: Sequence[Any], out: Any) -> int:
    """Launches of one call that the dispatcher made: the operator, its arguments, and what it returned."""
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
    """Launches of ATen's ``multi_tensor_apply`` over tensors of so many elements, in 1 to 5 lists of them.

    ``scalars``: each tensor has a scalar of its own.
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
    """Of ``_foreach_*`` and ``_fused_*``, whose last list holds counts of steps and is not chunked."""
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
    """Whether the elements lie in one piece, each once, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _tensors(out: Any) -> Iterator[Any]:
    yield from out if isinstance(out, list | tuple) else (out,)
