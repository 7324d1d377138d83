"""The MLP half of a transformer block, told of a transformation: normalisation, two products, action, GELU, residual.

    out = [x +] w_out · gelu( w_in · [LN](x) + w_action · action[image of token] + b_in ) + b_out

x (N, D) holds the tokens of B images one after another, image i in rows cu_seqlens[i] to cu_seqlens[i + 1]. The
action's part is a bias of its image, computed once an image (B, H): [x; action] is never concatenated. This version has
the plain-PyTorch reference, whose products are the library's; the normalisation's statistics are fp32 for half inputs,
and the products accumulate in fp32. It keeps the hidden activations for the backward pass.

Operations and bytes: `conditioned_mlp_flops`, `conditioned_mlp_bytes`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_backend, check_eps, check_floating, check_like, check_shape

__all__ = ["conditioned_mlp", "conditioned_mlp_bytes", "conditioned_mlp_flops", "conditioned_mlp_reference"]


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
    """Operations of the products (a multiply-add is two), forward, or backward without recomputation.

    `action_grad` counts the gradient to the action too, which training never needs.
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
    """Fewest bytes moved: every input read once and every result written once, the hidden staying on chip.

    The backward pass reads x, the incoming gradient and the weights, and writes the gradients of x and of the weights.
    `element` is the bytes of one number.
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
) -> Tensor:
    """What `conditioned_mlp` computes, in PyTorch's operators and differentiated by them. Arguments are not checked."""
    normed = x if norm_weight is None else F.layer_norm(x, (x.shape[1],), norm_weight, norm_bias, eps)
    if action is None or w_action is None or cu_seqlens is None:
        hidden = F.linear(normed, w_in, b_in)
    else:
        bias = F.linear(action, w_action, b_in)  # (B, H)
        lengths = cu_seqlens.long().diff()
        # The known size of the result spares the device a synchronisation with the host.
        image = torch.repeat_interleave(lengths, output_size=x.shape[0])  # (N,)
        # addmm adds the bias inside the product: one pass less over (N, H) than adding it afterwards.
        hidden = torch.addmm(bias.index_select(0, image), normed, w_in.t())
    out = F.linear(F.gelu(hidden), w_out, b_out)
    return out.add_(x) if residual else out


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
) -> Tensor:
    """[x +] w_out · gelu(w_in · [LN](x) + w_action · action[image of token] + b_in) + b_out.

    Args:
        x: (N, D), any floating type; N may be 0.
        w_in: (H, D), of x's type, as are all the following but cu_seqlens.
        b_in: (H,).
        w_out: (Do, H).
        b_out: (Do,).
        action: (B, A), one row an image; needs w_action and cu_seqlens.
        w_action: (H, A).
        cu_seqlens: (B + 1,) int32 that begins at 0, never falls and ends at N. The values are looked at on the CPU
            only: on another device that would wait for it.
        norm_weight: (D,), for a layer normalisation of x before the first product; needs norm_bias.
        norm_bias: (D,).
        residual: add x to the result; needs Do = D.
        eps: added to the variance.
        activation: "gelu", the exact one.
        backend: "auto" or "reference"; "triton" is not built in this version.

    Returns:
        (N, Do) of x's type.

    Raises:
        ValueError: an argument is of the wrong shape, type or device; its name comes first.

    """
    check_backend(backend)
    check_eps(eps)
    if activation != "gelu":
        raise ValueError(f'activation is {activation!r}; it must be "gelu"')
    check_weights(x, w_in, b_in, w_out, b_out, residual=residual)
    check_action(x, w_in, action, w_action, cu_seqlens)
    check_norm(x, norm_weight, norm_bias)
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
    )


def check_weights(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, *, residual: bool) -> None:
    """Raise ValueError unless tokens and weights fit together."""
    check_floating("x", x, 2)
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
    """Raise ValueError unless the three arguments of the action come together and fit x and w_in."""
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
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        rising = all(a <= b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != x.shape[0] or not rising:
            raise ValueError(f"cu_seqlens must begin at 0, never fall and end at N = {x.shape[0]}; found {bounds[:8]}")


def check_norm(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """Raise ValueError unless both affine parameters of the normalisation are there and fit x, or neither is."""
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} is missing; give norm_weight and norm_bias, or neither")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_shape(name, tensor, (x.shape[1],), "(D,)")
            check_like(name, tensor, "x", x)
