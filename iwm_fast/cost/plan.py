"""Plan a run before its launch: memory and time of every ZeRO stage, and which to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from iwm_fast.config import Config
from iwm_fast.config.batch import divide_batch
from iwm_fast.config.hosts import require_within_hosts
from iwm_fast.cost.activations import Activations, activations
from iwm_fast.cost.communication import Collective, Fabric, step_collectives
from iwm_fast.cost.devices import Device, Rate
from iwm_fast.cost.memory import Layout, Memory, layout_of, state_memory
from iwm_fast.cost.step_time import StepTime, image_flops, step_time
from iwm_fast.cost.tokens import Tokens, expected_padding
from iwm_fast.cost.update_memory import update_bytes

__all__ = ["WORTH", "Choice", "Cluster", "Planner", "Refused", "Stage", "best_of_each", "stage_record"]

# Assumed: memory of CUDA, NCCL and the decoders, and the allocator's fragmentation.
RESERVED, FRAGMENTED = 3 * 10**9, 0.08
# How much faster another stage must be planned before it is preferred: rates and overlap are assumed, with at least
# this error.
WORTH = 0.05


@dataclass(frozen=True)
class Cluster:
    """The cluster of a plan. data_rate: images/s per GPU of the input pipeline, None where unknown."""

    device: Device
    nodes: int
    gpus_per_node: int
    rate: Rate
    network: float
    data_rate: float | None = None

    @property
    def world(self) -> int:
        """The number of ranks, one per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes of a GPU that a run may use."""
        return int(self.device.memory * (1 - FRAGMENTED)) - RESERVED

    @property
    def fabric(self) -> Fabric:
        """Its links."""
        return Fabric(self.nodes, self.gpus_per_node, self.device.link, self.network)


@dataclass(frozen=True)
class Stage:
    """A ZeRO stage, with or without recomputation, at the largest micro-batch that fits, or at 1 where none does.

    padded: the share of padding among context and predicted tokens, with train.static_shapes. hpz: the ranks of a host
    that hold a copy of the parameters together (zero.hpz_partition_size); 1: no copy.
    """

    stage: int
    micro_batch: int
    accumulation: int
    fits: bool
    memory: Memory
    collectives: list[Collective]
    time: StepTime
    recompute: bool = False
    padded: float = 0.0
    hpz: int = 1


@dataclass(frozen=True)
class Refused:
    """A stage, with or without recomputation, that the configuration does not allow, and its reason."""

    stage: int
    recompute: bool
    why: str


@dataclass(frozen=True)
class Choice:
    """The chosen stage, or None where nothing fits, and the reason."""

    stage: Stage | None
    why: str


class Planner:
    """Plans one configuration; what does not depend on the cluster is computed once.

    tokens: of enough of the run's images to represent all.
    """

    def __init__(self, config: Config, tokens: Tokens, layout: Layout | None = None) -> None:
        self.config, self.tokens = config, tokens
        self.layout = layout or layout_of(config)

    @property
    def operations(self) -> float:
        """Useful FLOPs per image."""
        return image_flops(self.config, self.tokens).total / self.tokens.images

    @cached_property
    def settings(self) -> tuple[list[Config], list[Refused]]:
        """Every ZeRO stage without and with recomputation: the allowed ones, and the refused ones."""
        allowed, refused = [], []
        for stage in range(4):
            for recompute in (False, True):
                found = _changed(self.config, stage, recompute)
                if isinstance(found, Config):
                    allowed.append(found)
                else:
                    refused.append(Refused(stage, recompute, found))
        return allowed, refused

    @cached_property
    def _activations(self) -> dict[bool, Activations]:
        """Of the sampled images, without and with recomputation."""
        both = {}
        for recompute in (False, True):
            train = self.config.train.model_copy(update={"activation_checkpointing": recompute})
            both[recompute] = activations(self.config.model_copy(update={"train": train}), self.tokens)
        return both

    def with_batch(self, global_batch: int) -> Planner:
        """Return the plan of the same run with another global batch."""
        if global_batch == self.config.train.global_batch:
            return self

        def resized(config: Config) -> Config:
            train = config.train.model_copy(update={"global_batch": global_batch})
            return config.model_copy(update={"train": train})

        other = Planner(resized(self.config), self.tokens, self.layout)
        allowed, refused = self.settings
        other.settings = [resized(config) for config in allowed], refused
        other._activations = self._activations
        return other

    def variants(self, cluster: Cluster) -> list[Stage]:
        """Return every allowed stage without and with recomputation, stage 3 on several hosts also with a copy of the
        parameters within each, all at the largest micro-batch that fits, whatever train.micro_batch is. Raises
        UserError where the global batch does not divide over the ranks.
        """
        divide_batch(self.config.train.global_batch, cluster.world, None)
        tried = self.settings[0] + self._within_hosts(cluster)
        return [self._largest(config, cluster) for config in tried]

    def _within_hosts(self, cluster: Cluster) -> list[Config]:
        """Stage 3's settings with copies of the configured size, or else of a whole host's GPUs."""
        now, gpus = self.config.zero.hpz_partition_size, cluster.gpus_per_node
        size = now if now > 1 and gpus % now == 0 else gpus
        if cluster.nodes == 1 or size == 1:
            return []
        plain = [config for config in self.settings[0] if config.zero.stage == 3]
        zero = {"stage": 3, "hpz_partition_size": size}
        return [config.model_copy(update={"zero": config.zero.model_copy(update=zero)}) for config in plain]

    def stages(self, cluster: Cluster) -> list[Stage]:
        """Return the better variant of every stage: one that fits, the faster of two, without recomputation if equal.

        Where neither fits, the one that needs less memory.
        """
        return self.best(self.variants(cluster))

    def best(self, variants: Sequence[Stage]) -> list[Stage]:
        """Return the better variant of every stage."""
        return best_of_each(variants, self.config.zero.hpz_partition_size)

    def configured(self, cluster: Cluster) -> Stage:
        """Return the configured stage at the micro-batch that training would use, whether it fits or not.

        Raises UserError where zero.hpz_partition_size does not fit the hosts.
        """
        world, train = cluster.world, self.config.train
        hosts = [f"host {rank // cluster.gpus_per_node}" for rank in range(world)]
        require_within_hosts(self.config.zero.hpz_partition_size, hosts)
        micro, accumulation = divide_batch(train.global_batch, world, train.micro_batch)
        return self._at(self.config, cluster, micro, accumulation)

    def choose(self, stages: list[Stage], cluster: Cluster) -> Choice:
        """Choose among the stages that fit and are planned at most 5 % slower than the fastest: the largest
        micro-batch, then the configured stage, then the lowest. Rates and overlap are assumed: less than 5 % is no
        reason for a change.
        """
        fitting = [s for s in stages if s.fits]
        gigabytes = f"{cluster.usable / 1e9:.0f} GB usable of {cluster.device.memory / 1e9:.0f} GB"
        if not fitting:
            least = min(stages, key=lambda s: s.memory.total)
            recomputed = " with recomputation" if least.recompute else ""
            return Choice(
                None,
                f"nothing fits {gigabytes}: stage {least.stage}{recomputed} at a micro-batch of {least.micro_batch} "
                f"needs {least.memory.total / 1e9:.1f} GB; use larger GPUs, or more of them, which share the state",
            )
        fastest = min(fitting, key=lambda s: s.time.total)
        near = [s for s in fitting if s.time.total <= fastest.time.total * (1 + WORTH)]
        now = self.config.zero.stage
        chosen = min(near, key=lambda s: (-s.micro_batch, s.stage != now, s.stage))
        speed = "the fastest" if chosen is fastest else f"within {WORTH:.0%} of the fastest (stage {fastest.stage})"
        why = f"a micro-batch of {chosen.micro_batch} fits ({gigabytes}), {speed}"
        if chosen.recompute:
            why += "; without recomputation " + _without(chosen, self.settings[1])
        return Choice(chosen, why)

    def _largest(self, config: Config, cluster: Cluster) -> Stage:
        state = state_memory(config, self.layout, cluster.world)
        ceiling: int | None = None
        while True:
            micro, accumulation = divide_batch(config.train.global_batch, cluster.world, ceiling)
            fits = self._with_batch(config, state, micro, cluster.world).total <= cluster.usable
            if fits or micro == 1 or config.model.regularizer.kind != "none":  # which takes no accumulation
                return self._at(config, cluster, micro, accumulation)
            ceiling = micro - 1

    def _at(self, config: Config, cluster: Cluster, micro: int, accumulation: int) -> Stage:
        world = cluster.world
        memory = self._with_batch(config, state_memory(config, self.layout, world), micro, world)
        collectives = step_collectives(config, self.layout, world, accumulation)
        time = step_time(
            config, self.layout, self.tokens, collectives, cluster.fabric, cluster.device, cluster.rate.mfu,
            cluster.data_rate, accumulation, self._more(micro),
        )  # fmt: skip
        fits, recompute = memory.total <= cluster.usable, config.train.activation_checkpointing
        padded, zero = 1 - 1 / self._more(micro), config.zero
        return Stage(
            zero.stage, micro, accumulation, fits, memory, collectives, time, recompute, padded, zero.hpz_partition_size
        )

    def _more(self, micro: int) -> float:
        """Context and predicted tokens of a micro-batch with their padding, over those without."""
        drawn = self.tokens.images
        useful = (self.tokens.seen + self.tokens.asked) * micro / drawn
        return 1 + 2 * expected_padding(self.config, micro) / max(useful, 1.0)

    def _with_batch(self, config: Config, state: Memory, micro: int, world: int) -> Memory:
        """Add a micro-batch: activations by the sampled images' mean, and its pixels as DALI prefetches them; or, where
        that is more, what the optimizer's update holds when activations are freed.
        """
        drawn = self.tokens.images
        of_drawn = self._activations[config.train.activation_checkpointing]
        images = self.tokens.horizon + self.tokens.sources * self.tokens.history
        pixels = images * 3 * config.model.image**2 * (config.data.prefetch + 2)
        more = self._more(micro)
        passing = round(of_drawn.passing(micro) * more) + pixels * micro
        if config.train.cuda_graph:  # gradients that a replay writes and the engine copies
            passing += self.layout.trained_size * (2 if config.train.precision == "bf16" and config.zero.stage else 4)
        kept = round(of_drawn.kept * micro * more) // drawn
        update = update_bytes(config, self.layout, world)
        return replace(state, activations=kept, workspace=max(state.workspace + passing, update - kept))


def best_of_each(variants: Sequence[Stage], hpz: int = 1) -> list[Stage]:
    """Of each stage the variant that fits, the faster where both do, the one without recomputation where equal.

    Another zero.hpz_partition_size than `hpz`, the configured one, must be planned 5 % faster, as another stage must.
    """
    best = []
    for stage in sorted({v.stage for v in variants}):
        own = [v for v in variants if v.stage == stage]
        fitting = [v for v in own if v.fits]
        if fitting:
            at = {v.hpz: v for v in sorted(fitting, key=lambda v: (v.time.total, v.recompute), reverse=True)}
            fastest = min(at.values(), key=lambda v: (v.time.total, v.hpz))
            now = at.get(hpz) or at.get(1, fastest)
            best.append(now if now.time.total <= fastest.time.total * (1 + WORTH) else fastest)
        else:
            best.append(min(own, key=lambda v: v.memory.total))
    return best


def _without(chosen: Stage, refused: Sequence[Refused]) -> str:
    """Why the chosen stage recomputes: without, it does not fit or is not allowed."""
    why = [r.why for r in refused if r.stage == chosen.stage and not r.recompute]
    return f"it is refused ({why[0]})" if why else "it does not fit"


def _changed(config: Config, stage: int, recompute: bool) -> Config | str:
    """The configuration at another stage, with or without recomputation, or its reason for rejecting that."""
    tree = config.model_dump()
    tree["zero"] = {"stage": stage}
    tree["train"]["activation_checkpointing"] = recompute
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def stage_record(stage: Stage, config: Config, fabric: Fabric) -> dict[str, Any]:
    """Return a stage as JSON values: bytes and seconds."""
    sent = [c.sent_bytes(fabric.world) for c in stage.collectives]
    crossing = [fabric.transfer(c).network_bytes for c in stage.collectives]
    return {
        "stage": stage.stage,
        "activation_checkpointing": stage.recompute,
        "hpz_partition_size": stage.hpz,
        "fits": stage.fits,
        "micro_batch": stage.micro_batch,
        "accumulation": stage.accumulation,
        "padded": stage.padded,
        "memory_bytes": asdict(stage.memory) | {"total": stage.memory.total},
        "collectives": [
            asdict(c) | {"sent_bytes": s, "network_bytes": n}
            for c, s, n in zip(stage.collectives, sent, crossing, strict=True)
        ],
        "sent_bytes": sum(sent),
        "network_bytes": sum(crossing),
        "step_s": asdict(stage.time) | {"total": stage.time.total},
        "images_per_s": config.train.global_batch / stage.time.total,
    }
