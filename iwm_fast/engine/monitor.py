"""Evaluation while training: the divided state is gathered into a whole model on the first rank, which measures it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.actions import ActionSpace
from iwm_fast.config import Config
from iwm_fast.engine.distributed import Ranks
from iwm_fast.engine.ema import TargetAverage, target_name
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.eval.evaluate import evaluate_monitor
from iwm_fast.models.iwm import IWM

__all__ = ["evaluate_during_training", "whole_model"]


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
    zero: ZeroEngine, average: TargetAverage | None, config: Config, space: ActionSpace, ranks: Ranks
) -> dict[str, Any]:
    """k-NN and MRR of the live state, with their chances; the other ranks wait for the first."""
    model = whole_model(zero, average, config, space, ranks)
    found: list[Any] = [None]
    if ranks.first:
        found[0] = evaluate_monitor(model, config, space, config.eval.root or "")
    if ranks.world > 1:
        dist.broadcast_object_list(found, src=0)
    return dict(found[0])
