"""Convert the live engine's state to a checkpoint's fragments and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TARGET, TargetAverage, target_name
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM

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
def restore_module(module: IWM, saved: Checkpoint) -> None:
    """Fill a whole model with the weights, the target encoder with its EMA, and what is frozen from its own file.

    Raises UserError where the checkpoint is of another architecture, or of another kind of target.
    """
    constants = module.constants
    if bool(constants) != (saved.frozen is not None):
        lacks = "none" if saved.frozen is None else "some"
        raise UserError(
            f"{saved.path}: model.target is {module.config.target} and model.freeze_encoder "
            f"{str(module.config.freeze_encoder).lower()} in this configuration, and the checkpoint has {lacks} frozen "
            "weights; use its own config.yaml"
        )
    if saved.frozen is not None:
        saved.frozen.fill(constants)
    changing = {name: p for name, p in module.named_parameters() if name not in constants}
    saved.require_architecture({name: tuple(p.shape) for name, p in changing.items() if not name.startswith(TARGET)})
    for name, parameter in changing.items():
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
