"""The backend of a call; only this module decides it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .jit import INTERPRETED

__all__ = [
    "BACKENDS",
    "autocast_type",
    "backward_without_autocast",
    "launches_recorded",
    "recorded_launches",
    "resolve_backend",
    "use_backend",
    "without_autocast",
]

BACKENDS = ("auto", "reference", "triton")
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = bool(INTERPRETED.value)
# Meaning of "auto". A plain global, because torch.compile reads it while tracing and cannot read a context variable.
_auto = "auto"
_recorded = False  # whether launches are recorded instead of made; then tensors of any device will do


@contextlib.contextmanager
def recorded_launches() -> Iterator[None]:
    """Allow Triton on any device inside, where launches are recorded instead of made."""
    global _recorded  # noqa: PLW0603  (as above)
    before, _recorded = _recorded, True
    try:
        yield
    finally:
        _recorded = before


def launches_recorded() -> bool:
    """Return whether a GPU's launches are recorded: code that depends on the device must then do as on a GPU."""
    return _recorded


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Set the meaning of ``backend="auto"`` inside, to test or time a whole model on one backend."""
    global _auto  # noqa: PLW0603  (as above)
    _require_known(backend)
    before, _auto = _auto, backend
    try:
        yield
    finally:
        _auto = before


def resolve_backend(backend: str, name: str, x: Tensor, dtype: torch.dtype | None = None) -> str:
    """Return "triton" or "reference" for a call whose first argument is `x`, called `name` in errors.

    "auto": Triton for fp32, fp16 and bf16 on CUDA, else the reference. `dtype`: the call's argument of that name, if it
    decides the precision instead of `x`. Raise ValueError for an unknown backend, and if "triton" is given and cannot
    run.
    """
    _require_known(backend)
    if backend == "auto":
        backend = _auto
    computed = x.dtype if dtype is None else dtype
    if backend == "auto":
        return "triton" if x.is_cuda and computed in _TYPES else "reference"
    if backend == "reference":
        return backend
    if computed not in _TYPES:
        raise ValueError(
            f'{name if dtype is None else "dtype"} is {computed}; backend "triton" needs torch.float32, torch.float16 '
            'or torch.bfloat16: use backend="reference"'
        )
    if not x.is_cuda and not _INTERPRETED and not _recorded and x.device.type != "meta":
        raise ValueError(
            f'{name} is on {x.device}; backend "triton" needs a CUDA device, or Triton\'s interpreter '
            '(TRITON_INTERPRET=1 when Python starts): use backend="reference"'
        )
    return backend


def autocast_type(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype for matmuls on x's device, or None if autocast is off or x is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on x's device: inside an operator dtypes are explicit, and only its arguments were cast."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def backward_without_autocast(out: Tensor) -> Tensor:
    """Return `out`, with autocast off for its graph node's backward pass, wherever `backward` is called.

    PyTorch runs a matmul's backward pass under the autocast of whoever calls `backward`, which casts fp32 gradients to
    half. Hooks before and after the node run in its thread.
    """
    if torch.compiler.is_compiling():  # dtypes are fixed in a compiled graph
        return out
    node, kind = out.grad_fn, out.device.type
    if node is None or kind == "meta":
        return out
    found: list[bool] = []

    def before(_: Any) -> None:
        found.append(torch.is_autocast_enabled(kind))
        if found[-1]:
            torch.set_autocast_enabled(kind, False)

    def after(*_: Any) -> None:
        if found.pop():
            torch.set_autocast_enabled(kind, True)

    node.register_prehook(before)
    node.register_hook(after)
    return out


def _require_known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
