"""The parameters of a run, how each ZeRO stage lays them out over the ranks, and the bytes of state that a rank holds.

Stages 1 and 2 flatten AdamW's two groups (decayed and not), pad each to a multiple of twice the ranks (DeepSpeed's
alignment) and cut it evenly; stage 3 cuts every parameter evenly, padding its last part. The model is built on torch's
meta device: no memory, no values.

Bytes by kind and stage, which equal what DeepSpeed and the moving average allocate (tests/cost/test_counted.py). P
trained parameters, E of the moving average, F frozen, W ranks, e bytes of the working type (2 for bf16, 4 for fp32):

| stage | parameters | gradients | optimizer | EMA |
|---|---|---|---|---|
| 0 | 4P + eF, and under bf16 the step's rounded copies, 2P + 2E | 4P | 8P | 4E, which the target reads |
| 1 | e(P + E + F) | eP | 12P/W | 4E/W, and e(E/W)(1 + W) of the all-gather's buffers where W > 1 |
| 2 | e(P + E + F) | eP/W | 12P/W | as 1 |
| 3 | e(P + E + F)/W, and e(P + E + F) while the step runs | eP/W | 12P/W | 4E/W |

With zero.hpz_partition_size H a rank of stage 3 also holds e(P + E + F)/H: its part of the copy that the ranks of a
host hold together, from a parameter's first release in a step to the update (of F: always).

The optimizer's are AdamW's two moments and, from stage 1 on, the fp32 master weights. Divided state is what the fullest
rank holds, with DeepSpeed's padding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config

__all__ = ["BUCKET_BYTES", "Layout", "Memory", "Parameter", "buckets_of", "layout_of", "stage_settings", "state_memory"]

_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor
_FULL = 4  # bytes of fp32
# Bytes of one message at stage 0: long enough for a link's full rate, and a large model has dozens of them to overlap.
BUCKET_BYTES = 50_000_000


@dataclass(frozen=True)
class Parameter:
    """A parameter's name, its number of elements, whether weight decay applies to it (which chooses its group), and
    its shape.
    """

    name: str
    size: int
    decayed: bool
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """trained: the parameters that the optimizer updates, in the model's order. target: the EMA's. frozen: those that
    nothing changes, of a frozen target and a frozen encoder.
    """

    trained: tuple[Parameter, ...]
    target: tuple[Parameter, ...]
    frozen: tuple[Parameter, ...] = ()

    @property
    def trained_size(self) -> int:
        """Elements that the optimizer updates."""
        return sum(p.size for p in self.trained)

    @property
    def target_size(self) -> int:
        """Elements of the EMA; 0 where there is none."""
        return sum(p.size for p in self.target)

    @property
    def frozen_size(self) -> int:
        """Elements that nothing changes."""
        return sum(p.size for p in self.frozen)

    def groups(self) -> list[list[Parameter]]:
        """The optimizer's non-empty groups: with decay, then without."""
        split = [[p for p in self.trained if p.decayed], [p for p in self.trained if not p.decayed]]
        return [group for group in split if group]

    def flat_sizes(self, world: int) -> list[int]:
        """Elements of each flattened group with its padding (stages 1 and 2)."""
        step = _ALIGNMENT * world
        return [-(-sum(p.size for p in group) // step) * step for group in self.groups()]

    def longest_share(self, world: int) -> int:
        """The most elements of the encoder in any rank's part (stages 1 and 2): the size of its EMA, to which the
        all-gather is padded.
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
        """A rank's elements at stage 3, with padding."""
        return sum(-(-p.size // world) for p in parameters)


def layout_of(config: Config) -> Layout:
    """Return the layout of a configuration's model, which is built on torch's meta device: no memory, no values."""
    from iwm_fast.models.decay import decayed_parameters
    from iwm_fast.models.iwm import IWM

    actions = action_dim(config.actions)
    with torch.device("meta"):
        model = IWM(config.model, actions)
    decays, constants = decayed_parameters(model), model.constants
    found: dict[str, list[Parameter]] = {"trained": [], "target": [], "frozen": []}
    for name, p in model.named_parameters():
        role = "trained" if p.requires_grad else "frozen" if name in constants else "target"
        found[role].append(Parameter(name, p.numel(), decays[name], tuple(p.shape)))
    return Layout(**{role: tuple(parameters) for role, parameters in found.items()})


def stage_settings(stage: int) -> dict[str, Any]:
    """Return the packaged settings of a ZeRO stage (configs/deepspeed): bucket sizes and distances, in elements."""
    base = resources.files("iwm_fast.configs").joinpath(f"deepspeed/zero{stage}.json")
    settings: dict[str, Any] = json.loads(base.read_text())["zero_optimization"]
    return settings


def buckets_of(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return indices of `sizes` from the last to the first, in buckets of at most `most`, or of one larger size."""
    found: list[list[int]] = []
    filled = 0
    for i in reversed(range(len(sizes))):
        if not found or filled + sizes[i] > most:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += sizes[i]
    return found


@dataclass(frozen=True)
class Memory:
    """A rank's bytes by kind. workspace: buckets of the collectives, and temporaries of a step. host_copy: this rank's
    part of the parameters' copy within the host (zero.hpz_partition_size).
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int = 0
    workspace: int = 0
    host_copy: int = 0

    @property
    def total(self) -> int:
        """All kinds."""
        return sum(asdict(self).values())

    @property
    def state(self) -> int:
        """What does not grow with the micro-batch."""
        return self.total - self.activations - self.workspace


def state_memory(config: Config, layout: Layout, world: int) -> Memory:
    """Return parameters, gradients, optimizer state and EMA of the fullest rank, and the collectives' buckets.

    Gradients count at their most, at the end of a backward pass before the optimizer's step.
    """
    stage, trained, target, frozen = config.zero.stage, layout.trained_size, layout.target_size, layout.frozen_size
    working = 2 if config.train.precision == "bf16" else _FULL
    if stage == 0:
        rounded = 2 * (trained + target) if working == 2 else 0
        return Memory(
            parameters=_FULL * trained + rounded + working * frozen,
            gradients=_FULL * trained,
            optimizer=2 * _FULL * trained,
            ema=_FULL * target,
            workspace=_stage_0_workspace(config, layout, world),
        )
    bucket = working * int(stage_settings(stage)["reduce_bucket_size"])
    if stage == 3:
        mine, averaged = layout.divided(layout.trained, world), layout.divided(layout.target, world)
        constant = layout.divided(layout.frozen, world)
        host = config.zero.hpz_partition_size
        copied = (mine + averaged + constant) * world // host if host > 1 else 0
        return Memory(
            parameters=working * (mine + averaged + constant),
            gradients=working * mine,
            optimizer=3 * _FULL * mine,
            ema=_FULL * averaged,
            workspace=bucket + gathered_bytes(config, layout) + _FULL * mine,
            host_copy=working * copied,
        )
    flat = sum(layout.flat_sizes(world))
    longest = layout.longest_share(world)
    buffers = longest * (1 + world) if world > 1 else 0
    # Two, filled in turn, and the flat copy that is sent; DeepSpeed allocates them whole in every step.
    buckets = 3 * bucket if world > 1 else 0
    return Memory(
        parameters=working * (flat + target + frozen),
        gradients=working * (trained if stage == 1 else flat // world),
        optimizer=3 * _FULL * flat // world,
        ema=_FULL * longest + working * buffers,
        # The optimizer's step unscales its part of the gradients in fp32.
        workspace=buckets + _FULL * flat // world,
    )


def _stage_0_workspace(config: Config, layout: Layout, world: int) -> int:
    """Sent gradients are views of their buckets; of one bucket there is both, while it is filled. Where gradients are
    converted from bf16 at the end of the pass, both are there whole.
    """
    late = world == 1 or config.train.cuda_graph
    converted = 2 * layout.trained_size if config.train.precision == "bf16" and late else 0
    if world == 1:
        return converted
    sizes = [_FULL * p.size for p in layout.trained]
    largest = max(sum(sizes[i] for i in bucket) for bucket in buckets_of(sizes, BUCKET_BYTES))
    return max(converted, largest)


def gathered_bytes(config: Config, layout: Layout) -> int:
    """Return the bytes of whole parameters that a rank holds at stage 3 while a step runs.

    DeepSpeed keeps what it will read again within `stage3_max_reuse_distance` elements, and prefetches up to
    `stage3_max_live_parameters`. With the packaged 10⁹ of both, a model below that counts whole, though of one above
    half of it some is released and gathered again. Larger ones count at that ceiling.
    """
    working = 2 if config.train.precision == "bf16" else _FULL
    ceiling = int(stage_settings(3)["stage3_max_live_parameters"])
    return working * min(layout.trained_size + layout.target_size + layout.frozen_size, ceiling)
