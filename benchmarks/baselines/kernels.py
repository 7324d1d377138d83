"""What the kernels are compared with: each contender's way to compute an operation, and why it cannot where it cannot.

The conditioned MLP of other libraries: `benchmarks/baselines/mlp.py`. xformers' MLPs were removed but for SwiGLU.
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
    stopgrad_l2,
)

if TYPE_CHECKING:
    from iwm_fast.benchmarks.cases.kernel_cases import Case

__all__ = ["CONTENDERS", "Contender", "Skipped", "reference"]


def _nothing(case: Case, device: torch.device) -> None:
    """No requirement."""


# What libraries and compilers say that they cannot do.
_REFUSALS = (
    RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError, LookupError, OSError,
    ImportError,
)  # fmt: skip


def _their_refusals() -> tuple[type[Exception], ...]:
    return _REFUSALS


@dataclass(frozen=True)
class Contender:
    """make: the function for an operation; it gives None where it works in place. require: raises `Skipped` where it
    cannot do a case on a device.

    note: what it is, where its name does not say that. gelu: the form that it computes. one_size: its code is for one
    size, so that what is checked has to have the size that is timed. settles: calls with the same tensors until it runs
    what is timed. graphs: holds its memory between calls. refusals: exceptions that are a reason, not a fault of ours.
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
}


def _ours(backend: str, **other: Any) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        operator, options = _OPERATORS[operation]
        return lambda **given: operator(**given, **options, **other, backend=backend)

    return make


def reference(operation: str, gelu: str = "gelu") -> Callable[..., Any]:
    """The operation in plain PyTorch; gelu: the form of the MLP's."""
    other = {"activation": gelu} if operation == "conditioned_mlp" else {}
    return _ours("reference", **other)(operation)


def _compiled(mode: str) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        torch.compiler.reset()
        compiled: Callable[..., Any] = torch.compile(reference(operation), mode=mode, dynamic=False)
        return compiled

    return make


def _graphed(operation: str) -> Callable[..., Any]:
    """torch.compile under CUDA graphs, which find their inputs where they lie: in training nothing copies them."""
    if operation == "ema_update":
        raise Skipped("writes into its inputs, for which torch.compile takes no CUDA graph")
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
    # Warms up, records, replays.
    "compile max-autotune, CUDA graphs": _torch(
        _graphed, require=needs_gpu, settles=3, graphs=True,
        note="its inputs lie where the graph finds them; the incoming gradient is copied",
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
