"""Which backend answers a call, decided here and nowhere else."""

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
# What "auto" means. A plain global: torch.compile reads it while tracing, and cannot read a context variable.
_auto = "auto"
_recorded = False  # launches are recorded and none is made, so a tensor of any device will do


@contextlib.contextmanager
def recorded_launches() -> Iterator[None]:
    """Let Triton be asked for on any device inside, where launches are recorded instead of made."""
    global _recorded  # noqa: PLW0603  (as above)
    before, _recorded = _recorded, True
    try:
        yield
    finally:
        _recorded = before


def launches_recorded() -> bool:
    """Whether a GPU's launches are recorded: then what differs by device is what a GPU does."""
    return _recorded


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """What ``backend="auto"`` means inside: for tests and measurements that compare backends through whole models."""
    global _auto  # noqa: PLW0603  (as above)
    _require_known(backend)
    before, _auto = _auto, backend
    try:
        yield
    finally:
        _auto = before


def resolve_backend(backend: str, name: str, x: Tensor, dtype: torch.dtype | None = None) -> str:
    """Choose "triton" or "reference" for a call whose first argument is `x`, called `name` in errors.

    "auto": Triton for fp32, fp16 and bf16 on CUDA, else the reference. `dtype`: the call's argument of that name, where
    it and not the type of `x` says in what is computed. Raises ValueError for an unknown backend, and where Triton is
    asked for by name and cannot do it.
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
            f'{name if dtype is None else "dtype"} is {computed}; backend "triton" takes torch.float32, torch.float16 '
            'and torch.bfloat16: use backend="reference"'
        )
    if not x.is_cuda and not _INTERPRETED and not _recorded and x.device.type != "meta":
        raise ValueError(
            f'{name} is on {x.device}; backend "triton" needs a CUDA device, or Triton\'s interpreter '
            '(TRITON_INTERPRET=1 when Python starts): use backend="reference"'
        )
    return backend


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast asks of a product on x's device, or None where it is off or x is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off for x's device: inside an operator each type is as written, and only its arguments were cast."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def backward_without_autocast(out: Tensor) -> Tensor:
    """`out` itself, whose own node in the graph will run with autocast off, wherever `backward` is called.

    PyTorch runs a matrix product's backward pass under the autocast of the caller of `backward`, which takes fp32
    gradients to half. Hooks before and after a node run beside it, in its thread.
    """
    if torch.compiler.is_compiling():  # a compiled graph has its types already
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
