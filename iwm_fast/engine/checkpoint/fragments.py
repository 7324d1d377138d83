"""Convert the live engine's state to a checkpoint's fragments and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TARGET, TargetAverage, target_name
from iwm_fast.engine.zero import ZeroEngine

__all__ = ["fragments", "restore_module", "restore_shards"]


def fragments(zero: ZeroEngine, average: TargetAverage | None, ranks: Ranks) -> Iterator[Fragment]:
    """Return this rank's fragments; at stage 0, where all ranks hold everything, an even part of each tensor."""
    for shard in zero.shards:
        for kind, tensor in {"weight": shard.weight, **shard.moments}.items():
            yield from _own(zero, ranks, Fragment(kind, shard.name, shard.shape, shard.start, tensor))
    if average is not None:
        for shard, tensor in zip(average.shards, average.averages, strict=True):
            yield from _own(zero, ranks, Fragment("ema", target_name(shard.name), shard.shape, shard.start, tensor))


def _own(zero: ZeroEngine, ranks: Ranks, fragment: Fragment) -> Iterator[Fragment]:
    if zero.stage:
        yield fragment
        return
    size = -(-fragment.tensor.numel() // ranks.world)
    part = fragment.tensor[ranks.rank * size : (ranks.rank + 1) * size]
    if part.numel():
        yield Fragment(fragment.kind, fragment.name, fragment.shape, fragment.start + ranks.rank * size, part)


@torch.no_grad()
def restore_module(module: nn.Module, saved: Checkpoint) -> None:
    """Fill a whole model with the weights, and the target encoder with its EMA.

    Raises UserError where the checkpoint is of another architecture.
    """
    parameters = dict(module.named_parameters())
    online = {name: tuple(p.shape) for name, p in parameters.items() if not name.startswith(TARGET)}
    saved.require_architecture(online)
    for name, parameter in parameters.items():
        parameter.copy_(saved.full("ema" if name.startswith(TARGET) else "weight", name))


@torch.no_grad()
def restore_shards(zero: ZeroEngine, average: TargetAverage | None, saved: Checkpoint) -> None:
    """Restore this rank's fp32 weights, moments and EMA exactly, after ``restore_module`` and DeepSpeed's
    initialisation.
    """
    for shard in zero.shards:
        saved.fill("weight", shard.name, shard.start, shard.weight)
        for key, moment in shard.moments.items():
            saved.fill(key, shard.name, shard.start, moment)
    zero.set_updates(saved.updates)
    if average is not None:
        for shard, tensor in zip(average.shards, average.averages, strict=True):
            saved.fill("ema", target_name(shard.name), shard.start, tensor)
        average.refresh()
