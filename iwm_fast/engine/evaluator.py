"""The interface of evaluation while training, which the caller implements, and the model that it measures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.frozen_file import FrozenFile
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.ema import TargetAverage, target_name
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.models.iwm import IWM

__all__ = ["Evaluator", "live_model"]


class Evaluator(Protocol):
    """Measures the model every ``eval.every_steps`` steps."""

    def unmeasured(self, config: Config) -> str | None:
        """Return what cannot be measured on the images of ``eval.root``, and why; None where all can.

        The first rank calls it before the first step. Raises UserError where the images are missing or nothing can be
        measured.
        """

    def measure(
        self,
        model: IWM,
        config: Config,
        space: ActionSpace,
        ranks: Ranks,
        abandonable: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Any] | None:
        """Return numbers for metrics.jsonl, the same on every rank; collective.

        ``model``: in fp32 on this rank's device, for this measurement alone. ``abandonable``: wraps a rank's own work,
        which a signal may interrupt with Abandoned; then every rank returns None. An error of one rank raises UserError
        on all.
        """


def live_model(
    zero: ZeroEngine,
    average: TargetAverage | None,
    config: Config,
    space: ActionSpace,
    ranks: Ranks,
    frozen: FrozenFile | None = None,
) -> IWM:
    """Return the live state as one fp32 model on every rank's device; collective. ``frozen``: the weights that it does
    not change.
    """
    model = IWM(config.model, space.dim).to(ranks.device)
    constants = model.constants
    if frozen is not None:
        frozen.fill(constants)
    parts = [(s.name, s.start, s.weight) for s in zero.shards]
    if average is not None:
        parts += [(target_name(s.name), s.start, a) for s, a in zip(average.shards, average.averages, strict=True)]
    mine = {(name, start): tensor for name, start, tensor in parts}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in constants:
                continue
            flat = torch.zeros(parameter.numel(), device=ranks.device)
            for (owner, start), tensor in mine.items():
                if owner == name:
                    flat[start : start + tensor.numel()] = tensor
            if zero.stage and ranks.world > 1:  # at stage 0 every rank has all of it
                dist.all_reduce(flat)
            parameter.copy_(flat.view_as(parameter))
    return model.eval()
