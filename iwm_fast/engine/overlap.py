"""Gradients summed over ranks while the backward pass still computes others (ZeRO stage 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast.cost.memory import buckets_of

__all__ = ["SummedGradients"]


class SummedGradients:
    """Sums over `group` of the parameters' gradients: each bucket is sent when a backward pass has made all of it.

    A backward pass reaches parameters about in the reverse of their order, so buckets are filled from the last on. They
    are sent in that order on every rank, whatever order gradients come in. A gradient becomes a view of its bucket.
    due: whether the backward pass that runs is a step's last one; those before only add up.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, due: Callable[[], bool],
        bucket_bytes: int,
    ) -> None:  # fmt: skip
        sizes = [p.numel() * p.element_size() for p in parameters]
        self.buckets = [[parameters[i] for i in bucket] for bucket in buckets_of(sizes, bucket_bytes)]
        self._group, self._due = group, due
        self._of: dict[Tensor, int] = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._missing: list[set[Tensor]] = []
        self._sent: list[tuple[Any, Tensor]] = []
        self._restart()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.made)

    def made(self, parameter: Tensor) -> None:
        """Note that the pass that runs has added to this parameter's gradient, and send what is complete by that.

        Raises RuntimeError where the pass had done so before: the bucket may be under way.
        """
        if not self._due():
            return
        missing = self._missing[self._of[parameter]]
        if parameter not in missing:
            raise RuntimeError("a gradient came twice before its all-reduce was waited for")
        missing.remove(parameter)
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send()

    def wait(self) -> None:
        """Send what is left, zeros where no gradient came, and wait for the sums: a GPU's stream does, not the host."""
        while len(self._sent) < len(self.buckets):
            self._send()
        for work, _ in self._sent:
            work.wait()
        self._restart()

    def _restart(self) -> None:
        self._missing = [set(bucket) for bucket in self.buckets]
        self._sent = []

    def _send(self) -> None:
        """Begin the sum of the next bucket."""
        bucket = self.buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        at = 0
        for parameter in bucket:
            parameter.grad = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        self._sent.append((dist.all_reduce(flat, group=self._group, async_op=True), flat))
