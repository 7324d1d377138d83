"""Convert the live engine's state to a checkpoint's fragments and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.checkpoint.index import equal_part
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import ONLINE, TARGET, TargetAverage, target_name
from iwm_fast.engine.optimizer import MOMENTS
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM

__all__ = ["fragments", "require_fit", "restore_module", "restore_shards", "tensor_shapes"]


def fragments(zero: ZeroEngine, average: TargetAverage | None, ranks: Ranks) -> Iterator[Fragment]:
    """Return this rank's fragments; at stage 0, where all ranks hold everything, an even part of each tensor."""
    for shard in zero.shards:
        for kind, tensor in {"weight": shard.weight, **shard.moments}.items():
            yield from _own(zero, ranks, Fragment(kind, shard.name, shard.shape, shard.start, tensor))
    if average is not None:
        for shard, tensor in zip(average.shards, average.averages, strict=True):
            yield from _own(zero, ranks, Fragment("ema", target_name(shard.name), shard.shape, shard.start, tensor))


def tensor_shapes(zero: ZeroEngine, average: TargetAverage | None) -> dict[str, tuple[int, ...]]:
    """Return KIND/NAME → sizes of the tensors that all ranks' fragments are of, the same on each rank."""
    found = {f"{kind}/{name}": shape for name, shape in zero.shapes.items() for kind in ("weight", *MOMENTS)}
    if average is not None:
        found |= {f"ema/{target_name(n)}": shape for n, shape in zero.shapes.items() if n.startswith(ONLINE)}
    return found


def _own(zero: ZeroEngine, ranks: Ranks, fragment: Fragment) -> Iterator[Fragment]:
    if zero.stage:
        yield fragment
        return
    size = equal_part(fragment.tensor.numel(), ranks.world)
    part = fragment.tensor[ranks.rank * size : (ranks.rank + 1) * size]
    if part.numel():
        yield Fragment(fragment.kind, fragment.name, fragment.shape, fragment.start + ranks.rank * size, part)


@torch.no_grad()
def require_fit(module: IWM, saved: Checkpoint) -> None:
    """Fill what is frozen from its own file. Raises UserError where the checkpoint is of another architecture, or of
    another kind of target.
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
    online = {n: p for n, p in _changing(module).items() if not n.startswith(TARGET)}
    saved.require_architecture({name: tuple(p.shape) for name, p in online.items()})


def _changing(module: IWM) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not frozen, by name."""
    constants = module.constants
    return {name: p for name, p in module.named_parameters() if name not in constants}


@torch.no_grad()
def restore_module(module: IWM, saved: Checkpoint) -> None:
    """Fill a whole model with the weights, the target encoder with its EMA, and what is frozen from its own file.

    Raises UserError as `require_fit`.
    """
    require_fit(module, saved)
    wanted = [("ema" if n.startswith(TARGET) else "weight", n, p) for n, p in _changing(module).items()]
    for kind, name, parameter in wanted:
        saved.require_shape(kind, name, tuple(parameter.shape))
    saved.fill_all((kind, name, 0, parameter.view(-1)) for kind, name, parameter in wanted)


@torch.no_grad()
def restore_shards(zero: ZeroEngine, average: TargetAverage | None, saved: Checkpoint) -> None:
    """Restore this rank's fp32 weights, moments and EMA exactly, after `require_fit` and DeepSpeed's initialisation.

    It reads only this rank's parts. The working copies of weights and EMA, which every rank needs whole at stages 1 and
    2, are gathered from the ranks, as after a step.
    """
    wanted: list[tuple[str, str, int, torch.Tensor]] = []
    for shard in zero.shards:
        wanted += [(kind, shard.name, shard.start, t) for kind, t in {"weight": shard.weight, **shard.moments}.items()]
    if average is not None:
        for shard, tensor in zip(average.shards, average.averages, strict=True):
            wanted.append(("ema", target_name(shard.name), shard.start, tensor))
    saved.fill_all(wanted)
    zero.set_updates(saved.updates)
    zero.refresh()
    if average is not None:
        average.refresh()
