"""What a run needs and how long it takes, worked out before it starts, and the division of it to choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from iwm_fast.config import Config
from iwm_fast.planning.activations import activations
from iwm_fast.planning.communication import Collective, ring_bytes, step_collectives
from iwm_fast.planning.devices import Device
from iwm_fast.planning.fabric import Fabric
from iwm_fast.planning.layout import Layout, layout_of
from iwm_fast.planning.memory import Memory, state_memory
from iwm_fast.planning.rates import Rate
from iwm_fast.planning.steptime import StepTime, image_flops, step_time
from iwm_fast.planning.tokens import Tokens

__all__ = ["Choice", "Cluster", "Planner", "Stage", "stage_record"]

# Assumed: CUDA's and NCCL's own memory, the decoders', and what the allocator loses between its blocks.
RESERVED, FRAGMENTED = 3 * 10**9, 0.08


Divide = Callable[[int, int, int | None], tuple[int, int]]


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for. data_rate: images a second and GPU of the input path, None where it is not known."""

    device: Device
    nodes: int
    gpus_per_node: int
    rate: Rate
    network: float
    data_rate: float | None = None

    @property
    def world(self) -> int:
        """Ranks, one a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes of a GPU that a run may plan with."""
        return int(self.device.memory * (1 - FRAGMENTED)) - RESERVED


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage with the largest micro-batch that fits, or the smallest there is where none does."""

    stage: int
    micro_batch: int
    accumulation: int
    fits: bool
    memory: Memory
    collectives: list[Collective]
    time: StepTime


@dataclass(frozen=True)
class Choice:
    """The stage to choose, or None where nothing fits, and why."""

    stage: Stage | None
    why: str


class Planner:
    """Plans one configuration; what does not depend on the cluster is worked out once.

    tokens: of enough of the run's images to stand for all. divide: the loader's rule, (global batch, ranks, ceiling) to
    (micro-batch, accumulation).
    """

    def __init__(self, config: Config, tokens: Tokens, divide: Divide, layout: Layout | None = None) -> None:
        self.config, self.tokens, self.divide = config, tokens, divide
        self.layout = layout or layout_of(config)

    @property
    def operations(self) -> float:
        """Useful operations an image."""
        return image_flops(self.config, self.tokens).total / self.tokens.images

    def with_batch(self, global_batch: int) -> Planner:
        """The same run with another global batch."""
        train = self.config.train.model_copy(update={"global_batch": global_batch})
        return Planner(self.config.model_copy(update={"train": train}), self.tokens, self.divide, self.layout)

    def stages(self, cluster: Cluster) -> list[Stage]:
        """Every stage that the configuration allows. UserError where the ranks cannot share the global batch."""
        self.divide(self.config.train.global_batch, cluster.world, self.config.train.micro_batch)
        return [self._stage(config, cluster) for config in self._variants()]

    def choose(self, stages: list[Stage], cluster: Cluster) -> Choice:
        """The lowest stage among those with the largest micro-batch that fits: division is paid in messages."""
        fitting = [s for s in stages if s.fits]
        gigabytes = f"{cluster.usable / 1e9:.0f} GB usable of {cluster.device.memory / 1e9:.0f} GB"
        if not fitting:
            least = min(stages, key=lambda s: s.memory.total)
            return Choice(
                None,
                f"nothing fits {gigabytes}: stage {least.stage} with a micro-batch of {least.micro_batch} needs "
                f"{least.memory.total / 1e9:.1f} GB; set train.activation_checkpointing=true or use larger GPUs",
            )
        largest = max(s.micro_batch for s in fitting)
        chosen = next(s for s in fitting if s.micro_batch == largest)
        before = [s for s in stages if s.stage < chosen.stage]
        why = f"the lowest stage at which a micro-batch of {largest} fits ({gigabytes})"
        if before:
            why += f"; stage {before[-1].stage} " + (
                f"allows {before[-1].micro_batch}" if before[-1].fits else "does not fit at all"
            )
        return Choice(chosen, why)

    def _variants(self) -> Iterator[Config]:
        train = self.config.train
        for stage in range(4):
            if stage == 0 and train.activation_checkpointing and train.precision == "bf16":
                continue  # the configuration refuses it
            yield self.config.model_copy(update={"zero": self.config.zero.model_copy(update={"stage": stage})})

    def _stage(self, config: Config, cluster: Cluster) -> Stage:
        world, ceiling = cluster.world, config.train.micro_batch
        state = state_memory(config, self.layout, world)
        while True:
            micro, accumulation = self.divide(config.train.global_batch, world, ceiling)
            memory = self._with_batch(config, state, micro)
            if memory.total <= cluster.usable or micro == 1:
                break
            ceiling = micro - 1
        collectives = step_collectives(config, self.layout, world, accumulation)
        fabric = Fabric(cluster.nodes, cluster.gpus_per_node, cluster.device.link, cluster.network)
        time = step_time(
            config, self.layout, self.tokens, collectives, fabric, cluster.device, cluster.rate.mfu, cluster.data_rate
        )
        fits = memory.total <= cluster.usable
        return Stage(config.zero.stage, micro, accumulation, fits, memory, collectives, time)

    def _with_batch(self, config: Config, state: Memory, micro: int) -> Memory:
        """Add a micro-batch: activations by the drawn images' mean, and its pixels as DALI prefetches them."""
        drawn = self.tokens.images
        of_drawn = activations(config, self.tokens)
        pixels = (1 + self.tokens.sources) * 3 * config.model.image**2 * (config.data.prefetch + 2)
        passing = of_drawn.passing * micro // drawn + pixels * micro
        return replace(state, activations=of_drawn.kept * micro // drawn, workspace=state.workspace + passing)


def stage_record(stage: Stage, config: Config, world: int) -> dict[str, Any]:
    """A stage as JSON values: bytes and seconds."""
    sent = [ring_bytes(c.kind, c.size, world) for c in stage.collectives]
    return {
        "stage": stage.stage,
        "fits": stage.fits,
        "micro_batch": stage.micro_batch,
        "accumulation": stage.accumulation,
        "memory_bytes": asdict(stage.memory) | {"total": stage.memory.total},
        "collectives": [asdict(c) | {"sent_bytes": s} for c, s in zip(stage.collectives, sent, strict=True)],
        "sent_bytes": sum(sent),
        "step_s": asdict(stage.time) | {"total": stage.time.total},
        "images_per_s": config.train.global_batch / stage.time.total,
    }
