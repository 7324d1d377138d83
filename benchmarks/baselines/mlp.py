"""The conditioned MLP with QuACK, Liger-Kernel and Transformer Engine.

None of them has LayerNorm, action, GELU, biases and residual together. PyTorch, compiled, does the missing parts;
`NOTES` lists them. QuACK and Transformer Engine compute GELU's tanh form and are checked against that.

- QuACK: `MLP(recompute=True)`. That path drops biases and has no normalisation, so the action and the first bias become
  columns of its input beside the normalised tokens; its GEMM's K is a multiple of eight anyhow.
- Liger-Kernel: LayerNorm. Its MLPs (SwiGLU, GEGLU, tiled) and its activations are gated.
- Transformer Engine: `LayerNormMLP`. It normalises all inputs of its first GEMM, so an action is added between
  `LayerNormLinear` and `Linear`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast.benchmarks.baselines.skipped import Skipped, in_a_line
from iwm_fast.kernels.conditioned_mlp import conditioned_mlp_reference

if TYPE_CHECKING:
    from iwm_fast.benchmarks.cases.kernel_cases import Case

__all__ = [
    "NOTES",
    "cutlass_errors",
    "imported",
    "liger",
    "needs_gpu",
    "not_offered",
    "quack",
    "quack_takes",
    "transformer_engine",
]

NOTES = {
    "quack": "its MLP(recompute=True) in GELU's tanh form; LayerNorm, action and first bias (columns of its input), "
    "second bias and residual by torch.compile",
    "liger": "its LayerNorm; matmuls, biases, action, GELU and residual by torch.compile: its MLPs are gated",
    "transformer engine": "its LayerNormMLP in GELU's tanh form, the residual added by PyTorch; with an action its "
    "LayerNormLinear and Linear, and action and GELU between them by torch.compile",
}  # fmt: skip
_EPS = 1e-6
_ALIGNED = 8  # bf16 elements in 16 bytes, the vector width of QuACK's copies
_HOPPER = (9, 0)

Made = Callable[..., Tensor]


def imported(module: str, package: str) -> Any:
    """Import a library's module. Skipped says how to install it, or why it does not import."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise Skipped(f"not installed (pip install {package})") from error
        raise Skipped(f"does not import: {error}") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a missing CUDA library
        raise Skipped(f"does not import: {in_a_line(error)}") from error


def not_offered(_: str) -> Made:
    """For a library without this operation."""
    raise Skipped("does not offer the operation")


def needs_gpu(_: Case, device: torch.device) -> None:
    """Raise Skipped on a CPU."""
    if device.type != "cuda":
        raise Skipped("needs a GPU")


def _only_mlp(operation: str) -> None:
    if operation != "conditioned_mlp":
        raise Skipped("does not offer the operation")


def _image_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    # The known size avoids a device synchronisation.
    return torch.repeat_interleave(cu_seqlens.long().diff(), output_size=tokens)


def columns(
    x: Tensor, w_in: Tensor, b_in: Tensor, norm_weight: Tensor, norm_bias: Tensor, action: Tensor | None = None,
    w_action: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (N, K) and (H, K) whose matmul is the hidden before GELU: normalised tokens, action, ones for the bias.

    K is a multiple of eight.
    """
    tokens = [F.layer_norm(x, (x.shape[1],), norm_weight, norm_bias, _EPS)]
    weights = [w_in]
    if action is not None and w_action is not None and cu_seqlens is not None:
        tokens.append(action.index_select(0, _image_of_token(cu_seqlens, x.shape[0])))
        weights.append(w_action)
    used = sum(w.shape[1] for w in weights) + 1
    padding = -used % _ALIGNED
    tokens += [x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], padding)]
    weights += [b_in[:, None], w_in.new_zeros(w_in.shape[0], padding)]
    return torch.cat(tokens, dim=1), torch.cat(weights, dim=1)


def _added(x: Tensor, out: Tensor, b_out: Tensor) -> Tensor:
    return x + (out + b_out)


def quack(operation: str) -> Made:
    """QuACK's MLP with recomputation."""
    _only_mlp(operation)
    library = imported("quack.mlp", "quack-kernels")
    torch.compiler.reset()
    before, after = torch.compile(columns, dynamic=False), torch.compile(_added, dynamic=False)
    modules: dict[tuple[int, int, int], Any] = {}

    def run(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, **rest: Tensor) -> Tensor:
        tokens, weight = before(x, w_in, b_in, **rest)
        sizes = (tokens.shape[1], w_in.shape[0], w_out.shape[0])
        if sizes not in modules:
            # Built on the meta device: each call passes its own weights.
            modules[sizes] = library.MLP(
                *sizes, activation="gelu_tanh_approx", device="meta", dtype=x.dtype, recompute=True
            )
        own = {"fc1.weight": weight, "fc2.weight": w_out}
        out: Tensor = after(x, torch.func.functional_call(modules[sizes], own, (tokens,)), b_out)
        return out

    return run


def quack_takes(case: Case, device: torch.device) -> None:
    """Raise Skipped where its kernels would not run: it falls back to PyTorch silently."""
    needs_gpu(case, device)
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _HOPPER:
        raise Skipped(f"needs sm_90 or newer; this is sm_{major}{minor}")
    if case.width % _ALIGNED or case.hidden % _ALIGNED:
        raise Skipped(f"widths {case.width} and {case.hidden} are not multiples of {_ALIGNED}")


def cutlass_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of QuACK's compiler, which are no RuntimeError; none before it is imported."""
    common = sys.modules.get("cutlass.base_dsl.common")
    return () if common is None else (common.DSLBaseError,)


def _after_norm(x: Tensor, normed: Tensor, given: dict[str, Any]) -> Tensor:
    return x + conditioned_mlp_reference(normed, **given)


def liger(operation: str) -> Made:
    """Liger's LayerNorm, then PyTorch's MLP."""
    _only_mlp(operation)
    library = imported("liger_kernel.transformers.functional", "liger-kernel")
    torch.compiler.reset()
    rest = torch.compile(_after_norm, dynamic=False)

    def run(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, **given: Tensor) -> Tensor:
        out: Tensor = rest(x, library.liger_layer_norm(x, norm_weight, norm_bias, _EPS), given)
        return out

    return run


def _activated(hidden: Tensor, action: Tensor, w_action: Tensor, cu_seqlens: Tensor) -> Tensor:
    bias = F.linear(action, w_action).index_select(0, _image_of_token(cu_seqlens, hidden.shape[0]))
    return F.gelu(hidden + bias, approximate="tanh")


def transformer_engine(operation: str) -> Made:
    """LayerNormMLP, or its two halves with the action between them."""
    _only_mlp(operation)
    te = imported("transformer_engine.pytorch", "'transformer-engine[pytorch]'")
    torch.compiler.reset()
    between = torch.compile(_activated, dynamic=False)
    modules: dict[tuple[str, int, int], Any] = {}

    def call(kind: str, inputs: int, outputs: int, x: Tensor, own: dict[str, Tensor], **options: Any) -> Tensor:
        key = (kind, inputs, outputs)
        if key not in modules:
            modules[key] = getattr(te, kind)(inputs, outputs, params_dtype=x.dtype, device=x.device, **options)
        out: Tensor = torch.func.functional_call(modules[key], own, (x,))
        return out

    def run(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, **rest: Tensor) -> Tensor:
        hidden, width = w_in.shape
        norm = {"layer_norm_weight": rest["norm_weight"], "layer_norm_bias": rest["norm_bias"]}
        if "action" not in rest:
            own = {"fc1_weight": w_in, "fc1_bias": b_in, "fc2_weight": w_out, "fc2_bias": b_out}
            return x + call("LayerNormMLP", width, hidden, x, norm | own, eps=_EPS, activation="gelu")
        first = call("LayerNormLinear", width, hidden, x, norm | {"weight": w_in, "bias": b_in}, eps=_EPS)
        active = between(first, rest["action"], rest["w_action"], rest["cu_seqlens"])
        return x + call("Linear", hidden, width, active, {"weight": w_out, "bias": b_out})

    return run
