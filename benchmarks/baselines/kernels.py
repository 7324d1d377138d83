"""Implementations that the kernels are compared with: how each computes an operation, and why it cannot if it cannot.

Other libraries' conditioned MLP is in `benchmarks/baselines/mlp.py`. xformers removed its MLPs except SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo import mark_static_address

from iwm_fast.benchmarks.baselines import mlp
from iwm_fast.benchmarks.baselines.mlp import needs_gpu, not_offered
from iwm_fast.benchmarks.baselines.skipped import Skipped
from iwm_fast.environment import installed_version
from iwm_fast.kernels import (
    conditioned_mlp,
    e4m3_rows,
    ema_update,
    patchify,
    predictor_input,
    residual_norm,
    rope,
    sigreg_sums,
    stopgrad_l2,
)

if TYPE_CHECKING:
    from iwm_fast.benchmarks.cases.kernel_cases import Case

__all__ = ["CONTENDERS", "Contender", "Skipped", "reference"]


def _nothing(case: Case, device: torch.device) -> None:
    """No requirement."""


# What libraries and compilers raise for unsupported inputs.
_REFUSALS = (
    RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError,
    ImportError,
)  # fmt: skip


def _their_refusals() -> tuple[type[Exception], ...]:
    return _REFUSALS


@dataclass(frozen=True)
class Contender:
    """make: returns the function for an operation, whose result is None if it works in place. require: raises `Skipped`
    if the implementation does not support a case on a device.

    note: what it is, if its name does not say so. gelu: which GELU it computes. one_size: its code is compiled for one
    size, so the checked size must be the timed one. settles: calls with the same tensors before its steady state.
    graphs: holds memory between calls. refusals: exceptions that mean unsupported, not a bug of the benchmark.
    """

    version: str | None
    make: Callable[[str], Callable[..., Any]]
    require: Callable[[Case, torch.device], None] = _nothing
    note: str = ""
    gelu: str = "gelu"
    one_size: bool = False
    settles: int = 1
    graphs: bool = False
    refusals: Callable[[], tuple[type[Exception], ...]] = tuple


_OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conditioned_mlp": (conditioned_mlp, {"residual": True}),
    "stopgrad_l2": (stopgrad_l2, {"normalize_target": True}),
    "ema_update": (ema_update, {}),
    "patchify": (patchify, {}),
    "residual_norm": (residual_norm, {}),
    "predictor_input": (predictor_input, {}),
    "e4m3_rows": (e4m3_rows, {"activation": "gelu"}),
    "sigreg_sums": (sigreg_sums, {}),
    "rope": (rope, {}),
}


def _ours(backend: str, **other: Any) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        operator, options = _OPERATORS[operation]
        return lambda **given: operator(**given, **options, **other, backend=backend)

    return make


def reference(operation: str, gelu: str = "gelu") -> Callable[..., Any]:
    """Return the operation in plain PyTorch; gelu: the MLP's GELU."""
    other = {"activation": gelu} if operation == "conditioned_mlp" else {}
    return _ours("reference", **other)(operation)


def _compiled(mode: str) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        torch.compiler.reset()
        compiled: Callable[..., Any] = torch.compile(reference(operation), mode=mode, dynamic=False)
        return compiled

    return make


def _graphed(operation: str) -> Callable[..., Any]:
    """torch.compile with CUDA graphs whose inputs keep their addresses: in training nothing copies them."""
    if operation == "ema_update":
        raise Skipped("writes into its inputs: torch.compile takes no CUDA graph for it")
    compiled = _compiled("max-autotune")(operation)

    def run(**given: Any) -> Any:
        for value in given.values():
            if isinstance(value, Tensor):
                mark_static_address(value)
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**given)

    return run


def _torch(make: Callable[[str], Callable[..., Any]], **other: Any) -> Contender:
    return Contender(torch.__version__, make, one_size=True, refusals=_their_refusals, **other)


def _library(name: str, package: str, make: Callable[[str], Callable[..., Any]], **other: Any) -> Contender:
    defaults: dict[str, Any] = {"require": needs_gpu, "refusals": _their_refusals}
    defaults["note"] = mlp.NOTES.get(name, "")
    return Contender(installed_version(package), make, **(defaults | other))


def _quack_refusals() -> tuple[type[Exception], ...]:
    return (*_REFUSALS, *mlp.cutlass_errors())


CONTENDERS = {
    "iwm-fast triton": Contender(installed_version("iwm-fast"), _ours("triton"), needs_gpu),
    "eager": Contender(torch.__version__, _ours("reference")),
    "compile": _torch(_compiled("default")),
    "compile max-autotune": _torch(_compiled("max-autotune-no-cudagraphs"), require=needs_gpu),
    # Three calls: warm up, record, replay.
    "compile max-autotune, CUDA graphs": _torch(
        _graphed, require=needs_gpu, settles=3, graphs=True,
        note="inputs keep their addresses; the upstream gradient is copied",
    ),
    "quack": _library(
        "quack", "quack-kernels", mlp.quack, require=mlp.quack_takes, gelu="gelu_tanh",
        one_size=True, refusals=_quack_refusals,
    ),
    "liger": _library("liger", "liger-kernel", mlp.liger, one_size=True),
    "transformer engine": _library(
        "transformer engine", "transformer-engine", mlp.transformer_engine, gelu="gelu_tanh", one_size=True
    ),
    "xformers": _library("xformers", "xformers", not_offered),
}  # fmt: skip
