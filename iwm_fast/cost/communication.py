"""Collectives of one optimizer step, by ZeRO stage: the bytes that a rank sends, and their time.

This list was counted on DeepSpeed 0.19.8 (`measure.collective_bytes`, tests/cost/test_counted.py), and differs from
what papers say of the stages: stages 1 and 2 all-reduce whole gradients (`use_multi_rank_bucket_allreduce`), where a
reduce-scatter would send half; stage 2 does so after every micro-batch; stage 3 all-gathers every parameter once per
micro-batch, not twice, while the model is below `stage3_max_reuse_distance` elements.

Gradients are sent during the backward pass at every stage, each bucket when it is full: at stage 0 by `engine.overlap`,
at the others by DeepSpeed's `overlap_comm`. The last bucket is full when the pass ends, and overlaps with nothing;
where all gradients come at the end, with train.cuda_graph, none does (`step_time`).

Bytes sent by a rank in a ring of W (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), n bytes whole: all-reduce
2(W − 1)/W · n; reduce-scatter and all-gather (W − 1)/W · n.

A fast link connects the GPUs of a host, a network the hosts (`Fabric`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iwm_fast.config import Config
from iwm_fast.cost.memory import BUCKET_BYTES, Layout, buckets_of, stage_settings

__all__ = ["Collective", "Fabric", "Kind", "Transfer", "ring_bytes", "step_collectives"]

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
_FULL = 4  # bytes of fp32
# Assumed, not measured: the share of a link's data-sheet rate that large messages reach, and the seconds per hop. Every
# plan prints them.
LINK_EFFICIENCY = 0.8
LINK_HOP_S, NETWORK_HOP_S = 3e-6, 10e-6


@dataclass(frozen=True)
class Collective:
    """One kind of traffic in a step: `size` bytes of the whole tensor, in all micro-batches and buckets together.

    calls: the number of collectives. hidden_by: the computation that it overlaps with, if any. last: the share that is
    sent after that computation.
    """

    what: str
    kind: Kind
    size: int
    calls: int
    hidden_by: Literal["forward", "backward", None] = None
    last: float = 0.0


def ring_bytes(kind: Kind, size: int, world: int) -> float:
    """Return the bytes that one rank sends."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (world - 1) / world * size


def step_collectives(config: Config, layout: Layout, world: int, accumulation: int) -> list[Collective]:
    """Return everything above a hundred bytes that a step of `accumulation` micro-batches sends between `world` ranks.

    Not listed: the loss, the gradient's norm and the votes, scalars that take latency only.
    """
    if world == 1:
        return []
    stage = config.zero.stage
    working = 2 if config.train.precision == "bf16" else _FULL
    trained = layout.trained_size
    if stage == 0:
        calls, last = _buckets(layout, BUCKET_BYTES // _FULL)
        return [Collective("gradients", "all_reduce", _FULL * trained, calls, "backward", last)]
    buckets, last = _buckets(layout, int(stage_settings(stage)["reduce_bucket_size"]))
    if stage == 3:
        return _stage_3(layout, world, accumulation, working, buckets, last)
    flat = layout.flat_sizes(world)
    passes = accumulation if stage == 2 else 1
    found = [
        Collective("gradients", "all_reduce", working * trained * passes, buckets * passes, "backward", last),
        Collective("parameters", "all_gather", working * sum(flat), len(flat)),
    ]
    if layout.target:
        size = working * layout.longest_share(world) * world
        # It begins after the update, and the target's forward pass, which comes second, waits for it.
        found.append(Collective("target's average", "all_gather", size, 1, "forward"))
    return found


def _buckets(layout: Layout, most: int) -> tuple[int, float]:
    """(number of buckets of at most `most` elements, the last one's share of all elements)."""
    sizes = [p.size for p in layout.trained]
    buckets = buckets_of(sizes, most)
    return len(buckets), sum(sizes[i] for i in buckets[-1]) / sum(sizes)


def _stage_3(
    layout: Layout, world: int, accumulation: int, working: int, buckets: int, last: float
) -> list[Collective]:
    trained, target = (
        layout.divided(part, world) * world for part in (layout.trained, (*layout.target, *layout.frozen))
    )
    settings = stage_settings(3)
    whole = layout.trained_size + layout.target_size + layout.frozen_size
    passes = 1 if whole <= int(settings["stage3_max_reuse_distance"]) else 2
    gathers = -(-(passes * trained + target) // int(settings["stage3_prefetch_bucket_size"])) + 1
    return [
        Collective(
            "parameters", "all_gather", working * (passes * trained + target) * accumulation, gathers * accumulation,
            "forward",
        ),
        Collective(
            "gradients", "reduce_scatter", working * trained * accumulation, buckets * accumulation, "backward", last
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """The bytes of a collective that one rank sends over each link, and its seconds: over both at once, plus
    the hops'.
    """

    link_bytes: float
    network_bytes: float
    link_s: float
    network_s: float
    latency_s: float

    @property
    def seconds(self) -> float:
        """The slower link's seconds: rings stream through both."""
        return max(self.link_s, self.network_s) + self.latency_s


@dataclass(frozen=True)
class Fabric:
    """nodes hosts of gpus_per_node GPUs; link and network: bytes/s of one GPU in one direction."""

    nodes: int
    gpus_per_node: int
    link: float
    network: float

    @property
    def world(self) -> int:
        """The number of ranks, one per GPU."""
        return self.nodes * self.gpus_per_node

    def transfer(self, collective: Collective) -> Transfer:
        """Return a collective's transfer by rings through all GPUs, one per GPU of a host, each entering and leaving a
        host once.

        So one part in gpus_per_node of what a GPU sends crosses the network, and the rest stays within the host. Hops:
        (W − 1) per round, of which (nodes − 1) over the network (as in NCCL's own cost model).
        """
        world = self.world
        sent = ring_bytes(collective.kind, collective.size, world)
        crossing = 0.0 if self.nodes == 1 else 1 / self.gpus_per_node
        over_network = sent * crossing
        over_link = sent - over_network
        rounds = 2 if collective.kind == "all_reduce" else 1
        hops = (self.nodes - 1) * NETWORK_HOP_S + (world - self.nodes) * LINK_HOP_S
        return Transfer(
            over_link,
            over_network,
            over_link / (self.link * LINK_EFFICIENCY),
            over_network / (self.network * LINK_EFFICIENCY),
            collective.calls * rounds * hops,
        )
