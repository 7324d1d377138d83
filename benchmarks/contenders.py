"""What the kernels are compared with: each contender's way to compute an operation, and why it cannot where it cannot.

Liger-Kernel (its fused MLP is SwiGLU) and xformers (its MLPs were removed but for SwiGLU) offer none of them.
Transformer Engine's LayerNormMLP is the one without an action and with GELU's tanh form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iwm_fast.kernels import (
    conditioned_mlp,
    e4m3_rows,
    ema_update,
    patchify,
    predictor_input,
    residual_norm,
    stopgrad_l2,
)
from iwm_fast.planning.environment import installed_version

if TYPE_CHECKING:
    from iwm_fast.benchmarks.kernel_cases import Case

__all__ = ["CONTENDERS", "Contender", "Skipped"]


class Skipped(Exception):  # noqa: N818  (a reason, not an error)
    """Why a contender cannot take part."""


def _nothing(case: Case, device: torch.device) -> None:
    """No requirement."""


@dataclass(frozen=True)
class Contender:
    """make: the function for an operation; it gives None where it works in place. require: raises `Skipped` where it
    cannot do a case on a device.
    """

    version: str | None
    make: Callable[[str], Callable[..., Any]]
    require: Callable[[Case, torch.device], None] = _nothing


_OPERATORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conditioned_mlp": (conditioned_mlp, {"residual": True}),
    "stopgrad_l2": (stopgrad_l2, {"normalize_target": True}),
    "ema_update": (ema_update, {}),
    "patchify": (patchify, {}),
    "residual_norm": (residual_norm, {}),
    "predictor_input": (predictor_input, {}),
    "e4m3_rows": (e4m3_rows, {"activation": "gelu"}),
}


def _ours(backend: str) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        operator, options = _OPERATORS[operation]
        return lambda **given: operator(**given, **options, backend=backend)

    return make


def _compiled(mode: str) -> Callable[[str], Callable[..., Any]]:
    def make(operation: str) -> Callable[..., Any]:
        torch.compiler.reset()
        compiled: Callable[..., Any] = torch.compile(_ours("reference")(operation), mode=mode, dynamic=False)
        return compiled

    return make


def _needs_gpu(_: Case, device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a GPU")


def _transformer_engine(operation: str) -> Callable[..., Tensor]:
    if operation != "conditioned_mlp":
        raise Skipped("does not offer the operation")
    try:
        te: Any = importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        raise Skipped("not installed") from error
    modules: dict[tuple[int, int], Any] = {}

    def run(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, **norm: Tensor) -> Tensor:
        key = (w_in.shape[1], w_in.shape[0])
        if key not in modules:
            modules[key] = te.LayerNormMLP(*key, eps=1e-6, activation="gelu", params_dtype=x.dtype, device=x.device)
        parameters = {
            "layer_norm_weight": norm["norm_weight"], "layer_norm_bias": norm["norm_bias"], "fc1_weight": w_in,
            "fc1_bias": b_in, "fc2_weight": w_out, "fc2_bias": b_out,
        }  # fmt: skip
        out: Tensor = x + torch.func.functional_call(modules[key], parameters, (x,))
        return out

    return run


def _without_action(case: Case, device: torch.device) -> None:
    _needs_gpu(case, device)
    if case.actions:
        raise Skipped("does not offer an action")


def _does_not_offer(_: str) -> Callable[..., Tensor]:
    raise Skipped("does not offer the operation")


CONTENDERS = {
    "iwm-fast triton": Contender(installed_version("iwm-fast"), _ours("triton"), _needs_gpu),
    "eager": Contender(torch.__version__, _ours("reference")),
    "compile": Contender(torch.__version__, _compiled("default")),
    "compile max-autotune": Contender(torch.__version__, _compiled("max-autotune-no-cudagraphs"), _needs_gpu),
    "transformer engine": Contender(installed_version("transformer-engine"), _transformer_engine, _without_action),
    "liger": Contender(installed_version("liger-kernel"), _does_not_offer),
    "xformers": Contender(installed_version("xformers"), _does_not_offer),
}
