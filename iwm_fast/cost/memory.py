"""Bytes of state a rank holds, by kind and ZeRO stage; tested against what DeepSpeed and the moving average allocate.

P trained parameters, E of the moving average, W ranks, e bytes of the working type (2 for bf16, 4 for fp32):

| stage | parameters | gradients | optimizer | EMA |
|---|---|---|---|---|
| 0 | 4P, and under bf16 the step's rounded copies, 2P + 2E | 4P | 8P | 4E, which the target reads |
| 1 | eP + eE | eP | 12P/W | 4E/W, and e(E/W)(1 + W) of the all-gather's buffers where W > 1 |
| 2 | eP + eE | eP/W | 12P/W | as 1 |
| 3 | e(P + E)/W, and e(P + E) while the step runs | eP/W | 12P/W | 4E/W |

The optimizer's are AdamW's two moments and, from stage 1 on, the fp32 master weights. Divided state is what the fullest
rank holds, with DeepSpeed's padding (`layout`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from iwm_fast.config import Config
from iwm_fast.cost.buckets import BUCKET_BYTES, buckets_of
from iwm_fast.cost.layout import Layout, stage_settings

__all__ = ["Memory", "state_memory"]

_FULL = 4  # bytes of fp32


@dataclass(frozen=True)
class Memory:
    """A rank's bytes by kind. workspace: buckets of the collectives, and what a step needs for moments."""

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All kinds."""
        return sum(asdict(self).values())

    @property
    def state(self) -> int:
        """What does not grow with the micro-batch."""
        return self.total - self.activations - self.workspace


def state_memory(config: Config, layout: Layout, world: int) -> Memory:
    """Parameters, gradients, optimizer and moving average of the fullest rank, and the buckets of the collectives.

    Gradients are counted at their most, the end of a backward pass before the optimizer's step.
    """
    stage, trained, target = config.zero.stage, layout.trained_size, layout.target_size
    working = 2 if config.train.precision == "bf16" else _FULL
    if stage == 0:
        rounded = 2 * (trained + target) if working == 2 else 0
        return Memory(
            parameters=_FULL * trained + rounded,
            gradients=_FULL * trained,
            optimizer=2 * _FULL * trained,
            ema=_FULL * target,
            workspace=_stage_0_workspace(config, layout, world),
        )
    bucket = working * int(stage_settings(stage)["reduce_bucket_size"])
    if stage == 3:
        mine, averaged = layout.divided(layout.trained, world), layout.divided(layout.target, world)
        return Memory(
            parameters=working * (mine + averaged),
            gradients=working * mine,
            optimizer=3 * _FULL * mine,
            ema=_FULL * averaged,
            workspace=bucket + gathered_bytes(config, layout) + _FULL * mine,
        )
    flat = sum(layout.flat_sizes(world))
    longest = layout.longest_share(world)
    buffers = longest * (1 + world) if world > 1 else 0
    # Two, filled in turn, and the flat copy of one that is sent; DeepSpeed allocates them whole in every step.
    buckets = 3 * bucket if world > 1 else 0
    return Memory(
        parameters=working * (flat + target),
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
    """Bytes of whole parameters that a rank holds at stage 3 while a step runs.

    DeepSpeed keeps what it will read again within `stage3_max_reuse_distance` elements, and at most
    `stage3_max_live_parameters`: with the packaged 10⁹ a model below that is whole from its first forward to the end of
    the step. Larger ones are counted at that ceiling.
    """
    working = 2 if config.train.precision == "bf16" else _FULL
    ceiling = int(stage_settings(3)["stage3_max_live_parameters"])
    return working * min(layout.trained_size + layout.target_size, ceiling)
