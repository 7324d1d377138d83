"""The MLP half of a transformer block, conditioned on an action: LayerNorm, two matmuls, action, GELU, residual.

    out = [x +] w_out · gelu( w_in · [LN](x) + w_action · action[image of token] + b_in ) + b_out

x (N, D) holds the tokens of B images one after another, image i in rows cu_seqlens[i] to cu_seqlens[i + 1].

Fused (Triton): the action is one more iteration over the depth of the first matmul, for up to 16 components in half
precision; otherwise it is a bias per image, computed once (B, H). b_in and GELU are in that matmul's epilogue, b_out
and the residual in the second's. [x; action] is never concatenated, and an action never broadcast to tokens in memory.
Left to the library: the (B, H) bias, and any matmul for which it measures faster. Recomputed in the backward pass:
LayerNorm and hidden activations, of all tokens at once if they fit into the workspace (`workspace`, 1 GiB), else in
chunks of tokens. Statistics and accumulators are fp32.

Reference (plain PyTorch, below): the library's matmuls; saves the hidden activations for the backward pass.

FLOPs and bytes: `conditioned_mlp_flops`, `conditioned_mlp_bytes`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._lib.backend import autocast_type, backward_without_autocast, resolve_backend, without_autocast
from ._lib.checks import check_eps, check_floating, check_like, check_shape
from ._lib.rows import launching
from ._mlp import passes
from ._mlp.workspace import limited

__all__ = ["conditioned_mlp", "conditioned_mlp_bytes", "conditioned_mlp_flops", "conditioned_mlp_reference"]

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # to F.gelu's name of the approximation


def conditioned_mlp_flops(
    tokens: int,
    width: int,
    hidden: int,
    out: int,
    *,
    images: int = 0,
    actions: int = 0,
    backward: bool = False,
    action_grad: bool = False,
) -> int:
    """Return FLOPs of the matmuls (a multiply-add is two), forward, or backward without recomputation.

    `action_grad` includes the gradient of the action, which training does not need.
    """
    token = 2 * tokens * hidden * (width + out)
    action = 2 * images * hidden * actions
    if not backward:
        return token + action
    return 2 * token + (2 if action_grad else 1) * action


def conditioned_mlp_bytes(
    tokens: int,
    width: int,
    hidden: int,
    out: int,
    *,
    images: int = 0,
    actions: int = 0,
    element: int = 2,
    backward: bool = False,
) -> int:
    """Return minimum bytes moved: every input read once and every result written once, the hidden staying on chip.

    The backward pass reads x, the upstream gradient and the weights, and writes the gradients of x and of the weights.
    `element`: bytes per element.
    """
    weights = hidden * (width + out + actions) + hidden + out + 2 * width + images * actions
    if not backward:
        return element * (tokens * (width + out) + weights)
    return element * (tokens * (2 * width + out) + 2 * weights)


def conditioned_mlp_reference(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    action: Tensor | None = None,
    w_action: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: bool = False,
    eps: float = 1e-6,
    activation: str = "gelu",
) -> Tensor:
    """Compute `conditioned_mlp` with PyTorch's operators and autograd. Arguments are not checked."""
    normed = x if norm_weight is None else F.layer_norm(x, (x.shape[1],), norm_weight, norm_bias, eps)
    if action is None or w_action is None or cu_seqlens is None:
        hidden = backward_without_autocast(F.linear(normed, w_in, b_in))
    else:
        bias = backward_without_autocast(F.linear(action, w_action, b_in))  # (B, H)
        lengths = cu_seqlens.long().diff()
        # The known size avoids a device synchronisation.
        image = torch.repeat_interleave(lengths, output_size=x.shape[0])  # (N,)
        # addmm adds the bias inside the matmul, and saves one read and write of (N, H).
        hidden = backward_without_autocast(torch.addmm(bias.index_select(0, image), normed, w_in.t()))
    active = F.gelu(hidden, approximate=ACTIVATIONS[activation])
    out = backward_without_autocast(F.linear(active, w_out, b_out))
    return out.add_(x) if residual else out


@torch.library.custom_op("iwm_fast::conditioned_mlp", mutates_args=())
def _operator(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str, workspace: int,
) -> Tensor:  # fmt: skip
    with launching(x):
        return passes.forward(
            x, w_in, b_in, w_out, b_out, action, w_action, cu_seqlens, norm_weight, norm_bias, residual, eps,
            activation, workspace,
        )  # fmt: skip


@torch.library.custom_op("iwm_fast::conditioned_mlp_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, action: Tensor | None,
    w_action: Tensor | None, cu_seqlens: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: bool, eps: float, activation: str, workspace: int, weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of differentiable inputs, in the inputs' order; without `weights`, that of x alone."""
    with launching(x):
        found = passes.backward(
            grad, x, w_in, b_in, w_out, b_out, action, w_action, cu_seqlens, norm_weight, norm_bias, residual, eps,
            activation, workspace, weights,
        )  # fmt: skip
    return [g for g in vars(found).values() if g is not None]


@_operator.register_fake
def _(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], w_out.shape[0])


@_backward_operator.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    wanted = _differentiable(inputs[:10]) if inputs[-1] else inputs[:1]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _differentiable(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Return the given ones of the operator's ten tensors, without cu_seqlens."""
    return [t for i, t in enumerate(tensors) if t is not None and i != _CU_SEQLENS]


_CU_SEQLENS = 7  # index among the operator's tensors


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[1:10])
    found = iter(torch.ops.iwm_fast.conditioned_mlp_backward(grad, *tensors, *ctx.options, weights))
    grads = [None if t is None or i == _CU_SEQLENS else next(found, None) for i, t in enumerate(tensors)]
    return (*grads, None, None, None, None)


_operator.register_autograd(_differentiate, setup_context=_keep)


def _sizes(x: Any, w_in: Any, w_out: Any, action: Any) -> dict[str, Any]:
    images, actions = action or (0, 0)
    return {
        "tokens": x[0], "width": x[1], "hidden": w_in[0], "out": w_out[0], "images": images, "actions": actions,
    }  # fmt: skip


@register_flop_formula(torch.ops.iwm_fast.conditioned_mlp)
def _forward_flops(x: Any, w_in: Any, b_in: Any, w_out: Any, b_out: Any, action: Any, *_: Any, **__: Any) -> int:
    return conditioned_mlp_flops(**_sizes(x, w_in, w_out, action))


@register_flop_formula(torch.ops.iwm_fast.conditioned_mlp_backward)
def _backward_flops(
    grad: Any, x: Any, w_in: Any, b_in: Any, w_out: Any, b_out: Any, action: Any, *rest: Any, **_: Any
) -> int:
    """Return useful FLOPs: recomputation is not counted, as usual for MFU."""
    sizes = _sizes(x, w_in, w_out, action)
    if rest[-1]:
        return conditioned_mlp_flops(**sizes, backward=True)
    return conditioned_mlp_flops(**(sizes | {"images": 0}))  # x's two matmuls are as large as the forward pass's


def conditioned_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    action: Tensor | None = None,
    w_action: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: bool = False,
    eps: float = 1e-6,
    activation: str = "gelu",
    backend: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Return [x +] w_out · gelu(w_in · [LN](x) + w_action · action[image of token] + b_in) + b_out.

    Args:
        x: (N, D), any floating dtype; N may be 0.
        w_in: (H, D), of x's dtype, as all of the following except cu_seqlens.
        b_in: (H,).
        w_out: (Do, H).
        b_out: (Do,).
        action: (B, A), one row per image; needs w_action and cu_seqlens.
        w_action: (H, A).
        cu_seqlens: (B + 1,) int32, from 0 to N, not decreasing. Values are checked on the CPU only: on another device
            that would synchronise.
        norm_weight: (D,), for a LayerNorm of x before the first matmul; needs norm_bias.
        norm_bias: (D,).
        residual: add x to the result; needs Do = D.
        eps: added to the variance.
        activation: "gelu" (exact), or "gelu_tanh".
        backend: "triton", "reference", or "auto": Triton on CUDA for fp32, fp16 and bf16, else the reference.
        workspace: bytes for Triton's hidden activations, forward or backward; larger ones are processed in chunks of
            tokens. None: `use_workspace`'s, or 1 GiB.

    Under autocast all floating arguments are cast to its dtype first, except float64; statistics and sums stay fp32,
    and the backward pass runs without autocast wherever it is called. The Triton backend has no
    second derivative: it raises RuntimeError.

    Returns:
        (N, Do) of x's dtype, or of autocast's.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device; the message begins with its name.

    """
    check_eps(eps)
    workspace = limited(workspace)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    check_floating("x", x, 2)
    wanted = autocast_type(x)
    if wanted is not None:
        x, w_in, b_in, w_out, b_out = (t.to(wanted) for t in (x, w_in, b_in, w_out, b_out))
        action, w_action, norm_weight, norm_bias = (
            None if t is None else t.to(wanted) for t in (action, w_action, norm_weight, norm_bias)
        )
    check_weights(x, w_in, b_in, w_out, b_out, residual=residual)
    check_action(x, w_in, action, w_action, cu_seqlens)
    check_norm(x, norm_weight, norm_bias)
    # Without hidden units, columns or outputs there is nothing to launch, but the biases are still added.
    if resolve_backend(backend, "x", x) == "triton" and w_in.numel() and w_out.numel():
        return torch.ops.iwm_fast.conditioned_mlp(
            x, w_in, b_in, w_out, b_out, action, w_action, cu_seqlens, norm_weight, norm_bias, residual, eps,
            activation, workspace,
        )  # fmt: skip
    with without_autocast(x):
        return conditioned_mlp_reference(
            x,
            w_in,
            b_in,
            w_out,
            b_out,
            action=action,
            w_action=w_action,
            cu_seqlens=cu_seqlens,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            residual=residual,
            eps=eps,
            activation=activation,
        )


def check_weights(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, *, residual: bool) -> None:
    """Raise ValueError unless tokens and weights fit together."""
    check_floating("w_in", w_in, 2)
    check_floating("w_out", w_out, 2)
    hidden, out = w_in.shape[0], w_out.shape[0]
    check_shape("w_in", w_in, (hidden, x.shape[1]), "(H, D)")
    check_shape("b_in", b_in, (hidden,), "(H,)")
    check_shape("w_out", w_out, (out, hidden), "(Do, H)")
    check_shape("b_out", b_out, (out,), "(Do,)")
    for name, tensor in (("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out)):
        check_like(name, tensor, "x", x)
    if residual and out != x.shape[1]:
        raise ValueError(f"residual is True; w_out then needs D = {x.shape[1]} rows, it has {out}")


def check_action(
    x: Tensor, w_in: Tensor, action: Tensor | None, w_action: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise ValueError unless the action's three arguments are given together and fit x and w_in."""
    if action is None:
        for name, given in (("w_action", w_action), ("cu_seqlens", cu_seqlens)):
            if given is not None:
                raise ValueError(f"{name} is given without action; give both or neither")
        return
    if w_action is None or cu_seqlens is None:
        missing = "w_action" if w_action is None else "cu_seqlens"
        raise ValueError(f"{missing} is missing; action needs w_action and cu_seqlens")
    check_floating("action", action, 2)
    check_shape("w_action", w_action, (w_in.shape[0], action.shape[1]), "(H, A)")
    check_shape("cu_seqlens", cu_seqlens, (action.shape[0] + 1,), "(B + 1,)")
    check_like("action", action, "x", x)
    check_like("w_action", w_action, "x", x)
    check_like("cu_seqlens", cu_seqlens, "x", x, dtype=torch.int32)
    # While a graph is traced there are no values to check.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        rising = all(a <= b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != x.shape[0] or not rising:
            raise ValueError(f"cu_seqlens must run from 0 to N = {x.shape[0]} without decreasing; found {bounds[:8]}")


def check_norm(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """Raise ValueError unless both affine parameters of the LayerNorm are given and fit x, or neither is."""
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} is missing; give norm_weight and norm_bias, or neither")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_shape(name, tensor, (x.shape[1],), "(D,)")
            check_like(name, tensor, "x", x)
