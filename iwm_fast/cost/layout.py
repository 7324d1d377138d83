"""The parameters of a run and how each ZeRO stage lays them out over the ranks, without building anything.

Stages 1 and 2 flatten AdamW's two groups (decayed and not), pad each to a multiple of twice the ranks (DeepSpeed's
alignment) and cut it evenly; stage 3 cuts every parameter evenly, padding its last part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config

__all__ = ["Layout", "Parameter", "layout_of", "stage_settings"]

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, number of elements, and whether weight decay applies to it (which chooses its group)."""

    name: str
    size: int
    decayed: bool


@dataclass(frozen=True)
class Layout:
    """trained: the parameters that the optimizer moves, in the model's order. target: the moving average's."""

    trained: tuple[Parameter, ...]
    target: tuple[Parameter, ...]

    @property
    def trained_size(self) -> int:
        """Elements that the optimizer moves."""
        return sum(p.size for p in self.trained)

    @property
    def target_size(self) -> int:
        """Elements of the moving average; 0 with a shared target."""
        return sum(p.size for p in self.target)

    def groups(self) -> list[list[Parameter]]:
        """The optimizer's groups that are not empty: decayed, then not."""
        split = [[p for p in self.trained if p.decayed], [p for p in self.trained if not p.decayed]]
        return [group for group in split if group]

    def flat_sizes(self, world: int) -> list[int]:
        """Elements of each flattened group with its padding (stages 1 and 2)."""
        step = _ALIGNMENT * world
        return [-(-sum(p.size for p in group) // step) * step for group in self.groups()]

    def longest_share(self, world: int) -> int:
        """The most elements of the encoder in any rank's part (stages 1 and 2): what it averages, and to which the
        all-gather of the average is padded.
        """
        return int(self._encoder_shares(world).max()) if self.target else 0

    def _encoder_shares(self, world: int) -> NDArray[np.float64]:
        """Elements of the encoder in every rank's part, (W,): whole numbers, exact in float64.

        How many of the encoder's elements lie before a place grows by 1 per element within its parameters and by 0
        elsewhere, so that reading it off at the ranks' borders is linear interpolation.
        """
        shares = np.zeros(world)
        for group, flat in zip(self.groups(), self.flat_sizes(world), strict=True):
            sizes = np.array([p.size for p in group], np.float64)
            own = sizes * [p.name.startswith("encoder.") for p in group]
            borders = np.arange(world + 1) * (flat // world)
            before = np.interp(borders, np.append(0, sizes.cumsum()), np.append(0, own.cumsum()))
            shares += np.diff(before)
        return shares

    def divided(self, parameters: tuple[Parameter, ...], world: int) -> int:
        """A rank's elements at stage 3, padding included."""
        return sum(-(-p.size // world) for p in parameters)


def layout_of(config: Config) -> Layout:
    """The layout of a configuration's model, which is built on torch's meta device: no memory, no values."""
    from iwm_fast.models.decay import decayed_parameters
    from iwm_fast.models.iwm import IWM

    actions = action_dim(config.actions)
    with torch.device("meta"):
        model = IWM(config.model, actions)
    decays = decayed_parameters(model)
    named = [(p.requires_grad, Parameter(name, p.numel(), decays[name])) for name, p in model.named_parameters()]
    trained = tuple(p for trains, p in named if trains)
    return Layout(trained, tuple(p for trains, p in named if not trains))


def stage_settings(stage: int) -> dict[str, Any]:
    """The packaged settings of a ZeRO stage (configs/deepspeed): bucket sizes and distances, in elements."""
    base = resources.files("iwm_fast.configs").joinpath(f"deepspeed/zero{stage}.json")
    settings: dict[str, Any] = json.loads(base.read_text())["zero_optimization"]
    return settings
