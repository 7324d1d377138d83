"""Evaluation while training: each rank gathers the divided state into a whole model and measures its share of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.actions.transforms import ActionSpace
from iwm_fast.config import Config
from iwm_fast.data.sources.left_out import tell_once
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.engine.distributed.signals import Abandoned
from iwm_fast.engine.ema import TargetAverage, target_name
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.errors import UserError
from iwm_fast.eval.online import Share, join_left_out, join_shares, measure_share
from iwm_fast.eval.unusable import left_out_lines
from iwm_fast.eval.world_model.triplets import monitor_triplets
from iwm_fast.models.iwm import IWM

__all__ = ["evaluate_during_training", "whole_model"]

# What reading, decoding and computing raise. One rank alone may meet it, and all have to learn of it.
_FAULTS = (UserError, OSError, RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError)


def whole_model(
    zero: ZeroEngine, average: TargetAverage | None, config: Config, space: ActionSpace, ranks: Ranks
) -> IWM:
    """The live state as one fp32 model on every rank's device; collective."""
    model = IWM(config.model, space.dim).to(ranks.device)
    parts = [(s.name, s.start, s.weight) for s in zero.shards]
    if average is not None:
        parts += [(target_name(s.name), s.start, a) for s, a in zip(average.shards, average.averages, strict=True)]
    mine = {(name, start): tensor for name, start, tensor in parts}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = torch.zeros(parameter.numel(), device=ranks.device)
            for (owner, start), tensor in mine.items():
                if owner == name:
                    flat[start : start + tensor.numel()] = tensor
            if zero.stage and ranks.world > 1:  # at stage 0 every rank has all of it
                dist.all_reduce(flat)
            parameter.copy_(flat.view_as(parameter))
    return model.eval()


def evaluate_during_training(
    zero: ZeroEngine,
    average: TargetAverage | None,
    config: Config,
    space: ActionSpace,
    ranks: Ranks,
    abandonable: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any] | None:
    """k-NN and MRR of the live state, with their chances: every rank measures its share of the images; collective.

    What a rank cannot do ends all of them with its words, a UserError on every one. ``abandonable``: around a rank's
    own work, which may raise Abandoned there; None on every rank then.
    """
    model = whole_model(zero, average, config, space, ranks)
    if config.actions.groups == ("external",):
        return _of_triplets(model, config, space, ranks, abandonable)
    found: Share | str | None
    try:
        with abandonable():
            found = measure_share(model, config, space, config.eval.root or "", rank=ranks.rank, world=ranks.world)
    except Abandoned:
        found = None
    except _FAULTS as error:
        found = _said(error, ranks)
    shares: list[Share | str | None] = gather(found, ranks.world, ranks.control)
    for share in shares:
        if isinstance(share, str):
            raise UserError(share)
    if None in shares:
        return None
    whole = [share for share in shares if isinstance(share, Share)]
    results = join_shares(whole, config.eval.bank)
    if ranks.first:
        left_out = {name: part.record() for name, part in join_left_out(whole).items()}
        for line in (*whole[0].said, *left_out_lines(left_out)):
            tell_once(f"eval.root: {line}")
    return results


def _said(error: Exception, ranks: Ranks) -> str:
    """Words for the other ranks; what is no mistake of the user's is shown whole here."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return f"rank {ranks.rank}: {type(error).__name__}: {' '.join(str(error).split())}"


def _of_triplets(
    model: IWM,
    config: Config,
    space: ActionSpace,
    ranks: Ranks,
    abandonable: Callable[[], AbstractContextManager[None]],
) -> dict[str, Any] | None:
    """MRR among next frames, which has one bank: the first rank measures, the others wait."""
    found: list[Any] = [None]
    if ranks.first:
        try:
            with abandonable():
                found[0] = monitor_triplets(model, config, space, config.eval.root or "")
        except Abandoned:
            found[0] = None
        except _FAULTS as error:
            found[0] = _said(error, ranks)
    if ranks.world > 1:
        dist.broadcast_object_list(found, src=0, group=ranks.control)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return None if found[0] is None else dict(found[0])
