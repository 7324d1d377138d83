"""bf16 compute from fp32 weights, for the stage at which DeepSpeed keeps the weights as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Bf16Compute"]


class Bf16Compute(nn.Module):
    """Runs ``model`` with its parameters rounded to bf16 at each call; gradients arrive at the fp32 parameters.

    The arithmetic is that of a model whose weights are bf16 copies of fp32 master weights, as at ZeRO stages 1 to 3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model`` returns for the same arguments."""
        trained: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            (trained if parameter.requires_grad else frozen)[name] = parameter
        rounded = dict(zip(trained, _Rounded.apply(*trained.values()), strict=True))
        with torch.no_grad():
            rounded |= zip(frozen, _converted(list(frozen.values()), torch.bfloat16), strict=True)
        return functional_call(self.model, rounded, args, kwargs)


class _Rounded(torch.autograd.Function):
    """Copies of all tensors in bf16, and their gradients in fp32: a few launches each way, not one for each tensor."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_converted(list(tensors), torch.bfloat16))

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(there, _converted([grads[i] for i in there], torch.float32), strict=True):
            found[i] = grad
        return tuple(found)


def _converted(tensors: list[Any], dtype: torch.dtype) -> list[Tensor]:
    converted = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if converted:
        torch._foreach_copy_(converted, tensors)
    return converted
