"""All-reduce gradients while the backward pass computes others (ZeRO stage 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast.cost.memory import buckets_of

__all__ = ["SummedGradients"]


class SummedGradients:
    """All-reduces the parameters' gradients over `group`, each bucket once a backward pass has computed all of it.

    A backward pass reaches parameters roughly in reverse order, so buckets fill from the last on. Every rank sends them
    in that order, whatever order gradients come in. A gradient becomes a view of its bucket. due: whether the running
    backward pass is a step's last one; earlier ones only accumulate.
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
        """Note that the running pass has added to this parameter's gradient, and send complete buckets.

        Raises RuntimeError where the pass had done so before: the bucket may be in flight.
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
        """Send what is left, zeros for missing gradients, and wait for the sums: a GPU's stream waits, not the host."""
        while len(self._sent) < len(self.buckets):
            self._send()
        for work, _ in self._sent:
            work.wait()
        self._restart()

    def _restart(self) -> None:
        self._missing = [set(bucket) for bucket in self.buckets]
        self._sent = []

    def _send(self) -> None:
        """Start the all-reduce of the next bucket."""
        bucket = self.buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        at = 0
        for parameter in bucket:
            parameter.grad = flat[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        self._sent.append((dist.all_reduce(flat, group=self._group, async_op=True), flat))
