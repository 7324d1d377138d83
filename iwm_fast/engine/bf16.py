"""bf16 compute from fp32 weights, for ZeRO stage 0, where DeepSpeed leaves the weights in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iwm_fast.kernels._lib.once import once_differentiable, refuse_graph

__all__ = ["Bf16Compute"]

_NAME = "bf16 compute"  # in errors


class Bf16Compute(nn.Module):
    """Run ``model`` with its fp32 parameters rounded to bf16 at each call; they receive the gradients.

    The arithmetic equals bf16 copies of fp32 master weights, as at ZeRO stages 1 to 3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._early: _Early | None = None

    def hand_over(self, buckets: Sequence[Sequence[nn.Parameter]], made: Callable[[Tensor], None]) -> None:
        """Give a bucket's parameters their gradients once all of it has arrived, and call `made` for each.

        Without it all gradients come at the end of the backward pass, in one conversion.
        """
        self._early = _Early(buckets, made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``model`` returns for the same arguments."""
        trained: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.dtype == torch.bfloat16:
                continue  # frozen weights, which are rounded once
            (trained if parameter.requires_grad else frozen)[name] = parameter
        early = self._early if torch.is_grad_enabled() else None
        copies = early.copies(list(trained.values())) if early else _Rounded.apply(*trained.values())
        rounded = dict(zip(trained, copies, strict=True))
        with torch.no_grad():
            rounded |= zip(frozen, _converted(list(frozen.values()), torch.bfloat16), strict=True)
        return functional_call(self.model, rounded, args, kwargs)


class _Rounded(torch.autograd.Function):
    """Copies of all tensors in bf16, and their gradients in fp32, in a few launches each instead of one per tensor."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_converted(list(tensors), torch.bfloat16))

    @staticmethod
    @once_differentiable(_NAME)
    def backward(_ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(there, _converted([grads[i] for i in there], torch.float32), strict=True):
            found[i] = grad
        return tuple(found)


class _Early:
    """Rounded copies that are leaves of the graph, so that a gradient exists as soon as it is complete.

    Autograd runs the newest node first: `_Rounded`, made before everything else, would run last.
    """

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], made: Callable[[Tensor], None]) -> None:
        self._buckets, self._made = [list(bucket) for bucket in buckets], made
        self._of: dict[Tensor, int] = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._grads: dict[Tensor, Tensor] = {}
        self._left: list[int] = []
        self._takers = {p: self._taker(p) for p in self._of}

    def copies(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Copies in bf16, each with a hook that takes its gradient."""
        with torch.no_grad():
            found = _converted(list(parameters), torch.bfloat16)
        for parameter, copy in zip(parameters, found, strict=True):
            copy.requires_grad_().register_post_accumulate_grad_hook(self._takers[parameter])
        return found

    def _taker(self, parameter: Tensor) -> Callable[[Tensor], None]:
        def take(copy: Tensor) -> None:
            refuse_graph(_NAME)
            if not self._left:  # the pass's first gradient
                self._left = [len(bucket) for bucket in self._buckets]
                torch.autograd.Variable._execution_engine.queue_callback(self._end)  # noqa: SLF001  (has no other name)
            assert copy.grad is not None
            self._grads[parameter], copy.grad = copy.grad, None
            bucket = self._of[parameter]
            self._left[bucket] -= 1
            if not self._left[bucket]:
                self._hand(self._buckets[bucket])

        return take

    def _end(self) -> None:
        """At the end of the pass: convert the gradients of incomplete buckets."""
        self._left = []
        self._hand(list(self._grads))

    def _hand(self, parameters: Sequence[Tensor]) -> None:
        grads = _converted([self._grads.pop(p) for p in parameters], torch.float32)
        again = [(p.grad, grad) for p, grad in zip(parameters, grads, strict=True) if p.grad is not None]
        if again:
            torch._foreach_add_(*map(list, zip(*again, strict=True)))
        for parameter, grad in zip(parameters, grads, strict=True):
            if parameter.grad is None:
                parameter.grad = grad
        for parameter in parameters:
            self._made(parameter)


def _converted(tensors: list[Any], dtype: torch.dtype) -> list[Tensor]:
    converted = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if converted:
        torch._foreach_copy_(converted, tensors)
    return converted
