"""Inputs for the kernels' operators, and distances of two evaluations from a float64 one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels import conditioned_mlp


def mlp_inputs(
    lengths: Sequence[int],
    *,
    width: int,
    hidden: int,
    out: int | None = None,
    actions: int | None = 5,
    norm: bool = True,
    residual: bool = True,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return arguments of `conditioned_mlp`: tokens of size `scale`, weights that preserve it, new leaves."""
    generator = torch.Generator().manual_seed(seed)
    out = width if residual or out is None else out

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(device, dtype).requires_grad_()

    given: dict[str, Any] = {
        "x": draw(sum(lengths), width, size=scale),
        "w_in": draw(hidden, width, size=max(width, 1) ** -0.5),
        "b_in": draw(hidden, size=0.3),
        "w_out": draw(out, hidden, size=max(hidden, 1) ** -0.5),
        "b_out": draw(out, size=0.3),
        "residual": residual,
    }
    if actions is not None:
        bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
        given |= {
            "action": draw(len(lengths), actions),
            "w_action": draw(hidden, actions, size=max(actions, 1) ** -0.5),
            "cu_seqlens": bounds.to(device),
        }
    if norm:
        given |= {"norm_weight": draw(width), "norm_bias": draw(width, size=0.3)}
    return given


def cast(given: dict[str, Any], dtype: torch.dtype, device: str | None = None) -> dict[str, Any]:
    """Return the same values in another dtype: new leaves."""
    return {
        key: value.detach().to(device or value.device, dtype).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.to(device)
        if isinstance(value, Tensor) and device is not None
        else value
        for key, value in given.items()
    }


def outcome(given: dict[str, Any], upstream: Tensor, run: Callable[..., Tensor] = conditioned_mlp, **options: Any):
    """Return by name the result, and the gradient of each differentiable argument given `upstream`."""
    leaves = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    out = run(**given, **options)
    weight = upstream.to(out.device, out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weight, allow_unused=True)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return ‖found − exact‖ / ‖exact‖ of each tensor, or the norm itself if the exact one is zero."""
    result = {}
    for name, wanted in exact.items():
        error = (found[name].double().cpu() - wanted.double().cpu()).norm()
        size = wanted.double().norm().cpu()
        result[name] = float(error / size) if size > 0 else float(error)
    return result


def conditions(
    given: dict[str, Any], exact: dict[str, Tensor], evaluate: Callable[[dict[str, Any]], dict[str, Tensor]]
) -> dict[str, float]:
    """Return condition numbers: how far results move, relative to their size, if inputs do; at least 1.

    A result that nearly cancels (the gradient of one image's only action is one sum of both signs) moves by many times
    the rounding of its terms, and no evaluation can do better. `given`, of fp32 or wider, is changed by 2⁻²⁴ of each
    value at random, and `evaluate` works in float64.
    """
    generator, step, draws = torch.Generator().manual_seed(0), 2.0**-24, 4
    squares = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        moved = cast(given, torch.float64, "cpu")
        with torch.no_grad():
            for value in moved.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    signs = 2 * torch.randint(0, 2, value.shape, generator=generator) - 1
                    value.mul_(1 + step * signs)
        for name, distance in distances(evaluate(moved), exact).items():
            squares[name] += distance**2 / draws
    return {name: max(1.0, math.sqrt(square) / step) for name, square in squares.items()}
