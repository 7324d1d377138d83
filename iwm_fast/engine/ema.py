"""The target encoder's EMA: fp32, sharded over the ranks as ZeRO shards the optimizer state.

A rank updates only the parts of the encoder whose fp32 weights it holds, so the update needs no communication. The same
pass over memory (`kernels.ema_update`) writes its part of the working copy that the target's forward pass reads. At
stage 0 the EMA is the working copy. At stages 1 and 2 one coalesced all-gather per step, in the working dtype, sends
it; it begins after the update, and the target's next forward pass waits for it, so that it overlaps with fetching data
and the online encoder. At stage 3, and on a rank alone, it is written where the target reads, and at stage 3 DeepSpeed
all-gathers it by layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast import kernels
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.engine.host_copies import drop
from iwm_fast.engine.zero import Shard, ZeroEngine

__all__ = ["ONLINE", "TARGET", "TargetAverage", "target_name"]

ONLINE, TARGET = "encoder.", "target_encoder."


def target_name(online: str) -> str:
    """Return the target's name of an encoder's parameter."""
    return TARGET + online.removeprefix(ONLINE)


class TargetAverage:
    """``average ← momentum · average + (1 − momentum) · weight``, element by element, in fp32."""

    def __init__(self, zero: ZeroEngine, ranks: Ranks, start: Mapping[str, Tensor] | None = None) -> None:
        """``start``: fp32 weights of the target encoder by name, where it does not start as the encoder; at stage 0 it
        starts as the module has it.
        """
        self.shards: list[Shard] = [s for s in zero.shards if s.name.startswith(ONLINE)]
        self._ranks = ranks
        self._stage = zero.stage
        self._gathering: dist.Work | None = None
        targets = dict(zero.module.named_parameters())
        self._targets: dict[str, nn.Parameter] = {s: p for s, p in targets.items() if s.startswith(TARGET)}
        self._weights = [s.weight for s in self.shards]
        self._mine: list[Tensor] = []
        if zero.stage == 0:
            self.averages = [self._targets[target_name(s.name)].data.view(-1) for s in self.shards]
            return
        self.averages = [s.weight.clone() for s in self.shards]
        if zero.stage == 3:
            parts = (self._targets[target_name(s.name)].ds_tensor for s in self.shards)  # type: ignore[attr-defined]
            self._mine = [p.data.view(-1)[: s.weight.numel()] for p, s in zip(parts, self.shards, strict=True)]
        elif ranks.world == 1:
            self._mine = [self._targets[target_name(s.name)].data.view(-1)[s.start : s.stop] for s in self.shards]
        else:
            self._lay_out()
            # A replay calls no module inside the graph.
            reader = zero.graphed or zero.module.get_submodule(TARGET.removesuffix("."))
            reader.register_forward_pre_hook(lambda *_: self.arrive())
        if start:
            for shard, average in zip(self.shards, self.averages, strict=True):
                average.copy_(start[target_name(shard.name)].view(-1)[shard.start : shard.stop])
            self.refresh()

    def update(self, momentum: float, unless: Tensor | None = None) -> None:
        """Move the EMA towards the weights by ``1 − momentum`` and refresh the working copy.

        Does nothing where ``unless``, a scalar on the device, is not 0.
        """
        self.arrive()
        kernels.ema_update(self.averages, self._weights, momentum, self._mine, unless=unless)
        self._send()

    def refresh(self) -> None:
        """Start copying the EMA to the working copy, for the target's next forward pass."""
        self.arrive()
        if self._mine:  # a rank's slice may lie wholly in the predictor, and torch rejects empty lists
            torch._foreach_copy_(self._mine, self.averages)
        self._send()

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for the running all-gather, if any, and update the working copy."""
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            gathering.wait()  # on a GPU the stream waits, not the host
            torch._foreach_copy_(self._working, self._received)

    def _send(self) -> None:
        """Start the all-gather of each rank's part, where the target does not read it in place."""
        if self._stage == 3:
            drop(self._targets.values())
        elif self._stage in (1, 2) and self._ranks.world > 1:
            # As bytes, because not every backend gathers every dtype.
            everyone, sent = self._everyone.view(torch.uint8), self._sent.view(torch.uint8)
            self._gathering = dist.all_gather_into_tensor(everyone, sent, async_op=True)

    def _lay_out(self) -> None:
        """Allocate the all-gather's buffers: each rank sends its parts in a row, padded to the longest rank."""
        mine = [(target_name(s.name), s.start, s.weight.numel()) for s in self.shards]
        layouts: list[list[tuple[str, int, int]]] = gather(mine, self._ranks.world)
        longest = max(sum(length for _, _, length in layout) for layout in layouts)
        example = next(iter(self._targets.values()))
        self._everyone = torch.zeros(len(layouts) * longest, dtype=example.dtype, device=example.device)
        self._sent = torch.zeros_like(self._everyone[:longest])
        self._mine = list(_pieces(self._sent, mine))
        self._working: list[Tensor] = []
        self._received: list[Tensor] = []
        for rank, layout in enumerate(layouts):
            self._received += _pieces(self._everyone[rank * longest :], layout)
            for name, start, length in layout:
                self._working.append(self._targets[name].data.view(-1)[start : start + length])


def _pieces(flat: Tensor, layout: list[tuple[str, int, int]]) -> list[Tensor]:
    offsets = [0]
    for _, _, length in layout:
        offsets.append(offsets[-1] + length)
    return [flat[a:b] for a, b in itertools.pairwise(offsets)]
