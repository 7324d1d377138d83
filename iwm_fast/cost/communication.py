"""Collectives of one optimizer step, by ZeRO stage: the bytes that a rank sends, and their time.

This list was counted on DeepSpeed 0.19.8 (`measure.collective_bytes`, tests/cost/test_counted.py), and differs from
what papers say of the stages: stages 1 and 2 all-reduce whole gradients (`use_multi_rank_bucket_allreduce`), where a
reduce-scatter would send half; stage 2 does so after every micro-batch; stage 3 all-gathers a parameter once per
micro-batch, and again in the backward pass only where `stage3_max_reuse_distance` elements or more of others are read
in between (some of a ViT-L's, none of a ViT-B's).

With zero.hpz_partition_size a trained parameter and the target's are gathered over all ranks once per step, and each
further time within the host; frozen ones always within the host.

Gradients are sent during the backward pass at every stage (of several micro-batches: the last one's at stages 0 and 1,
each one's at 2 and 3), each bucket when it is full: at stage 0 by `engine.overlap`, at the others by DeepSpeed's
`overlap_comm`. The last bucket is full when the pass ends, and overlaps with nothing; where all gradients come at the
end, with train.cuda_graph, none does (`step_time`).

Bytes sent by a rank in a ring of W (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002), n bytes whole: all-reduce
2(W − 1)/W · n; reduce-scatter and all-gather (W − 1)/W · n.

A fast link connects the GPUs of a host, a network the hosts (`Fabric`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iwm_fast.config import Config
from iwm_fast.cost.memory import BUCKET_BYTES, Layout, Parameter, buckets_of, stage_settings
from iwm_fast.cost.muon import fullest_rank, matrices_of

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
    sent after that computation. ranks: how many, of one host, send it to each other; 0: all. share: of that
    computation, the part that it overlaps with.
    """

    what: str
    kind: Kind
    size: int
    calls: int
    hidden_by: Literal["forward", "backward", None] = None
    last: float = 0.0
    ranks: int = 0
    share: float = 1.0

    def sent_bytes(self, world: int) -> float:
        """The bytes that one of `world` ranks sends."""
        return ring_bytes(self.kind, self.size, self.ranks or world)


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
        found = [
            Collective("gradients", "all_reduce", _FULL * trained, calls, "backward", last, share=1 / accumulation)
        ]
        if config.train.optimizer == "muon":
            _, elements = fullest_rank(matrices_of(layout), world)
            found.append(Collective("Muon's updates", "all_gather", working * elements * world, 1))
        return found
    if stage == 3:
        return _stage_3(config, layout, world, accumulation)
    buckets, last = _buckets(layout, int(stage_settings(stage)["reduce_bucket_size"]))
    flat = layout.flat_sizes(world)
    passes = accumulation if stage == 2 else 1
    found = [
        Collective(
            "gradients",
            "all_reduce",
            working * trained * passes,
            buckets * passes,
            "backward",
            last,
            share=passes / accumulation,
        ),
        Collective("parameters", "all_gather", working * sum(flat), len(flat)),
    ]
    if layout.target:
        size = working * layout.longest_share(world) * world
        # It begins after the update, and the target's forward pass, which comes second, waits for it.
        found.append(Collective("target's average", "all_gather", size, 1, "forward", share=1 / accumulation))
    return found


def _buckets(layout: Layout, most: int) -> tuple[int, float]:
    """(number of buckets of at most `most` elements, the last one's share of all elements)."""
    sizes = [p.size for p in layout.trained]
    buckets = buckets_of(sizes, most)
    return len(buckets), sum(sizes[i] for i in buckets[-1]) / sum(sizes)


def _stage_3(config: Config, layout: Layout, world: int, passes: int) -> list[Collective]:
    """`passes`: micro-batches."""
    working = 2 if config.train.precision == "bf16" else _FULL
    settings, host = stage_settings(3), config.zero.hpz_partition_size
    trained, target, frozen = (
        layout.divided(part, world) * world for part in (layout.trained, layout.target, layout.frozen)
    )
    again = layout.divided(_read_again(config, layout, int(settings["stage3_max_reuse_distance"])), world) * world
    buckets, last = _buckets(layout, int(settings["reduce_bucket_size"]))

    def gather(elements: int, times: int, beside: Literal["forward", "backward"], **how: float) -> list[Collective]:
        calls = times * (-(-elements // int(settings["stage3_prefetch_bucket_size"])) + 1)
        what = "parameters" if beside == "forward" else "parameters again"
        what += " within the host" if "ranks" in how else ""
        found = Collective(what, "all_gather", working * elements * times, calls, beside, **how)  # type: ignore[arg-type]
        return [found] if elements and times else []

    if host == 1:
        gathers = gather(trained + target + frozen, passes, "forward") + gather(again, passes, "backward")
    else:
        gathers = [
            *gather(trained + target, 1, "forward", share=1 / passes),
            *gather(trained + target + frozen, passes - 1, "forward", ranks=host),
            *gather(frozen, 1, "forward", ranks=host),
            *gather(again, passes, "backward", ranks=host),
        ]
    return [
        *gathers,
        Collective("gradients", "reduce_scatter", working * trained * passes, buckets * passes, "backward", last),
    ]


def _read_again(config: Config, layout: Layout, distance: int) -> tuple[Parameter, ...]:
    """The trained parameters that DeepSpeed releases between their forward and backward pass: those of which at least
    `distance` elements of others are read in between. To the nearest parameter; DeepSpeed works by module.

    The forward pass reads encoder, target, predictor; the backward pass those trained from the last to the first, and
    recomputation each block once more.
    """
    backward = 2 if config.train.activation_checkpointing else 1
    after = 0
    found: list[Parameter] = []
    for parameter in reversed(layout.trained):
        between = after * (1 + backward)
        if parameter.name.startswith("encoder."):
            between += layout.target_size + sum(p.size for p in layout.frozen)
        if between >= distance:
            found.append(parameter)
        after += parameter.size
    return tuple(reversed(found))


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
        (W − 1) per round, of which (nodes − 1) over the network. An all-reduce may go through two trees of hosts
        instead, with the same bytes (Sanders, Speck and Träff 2009, doi:10.1016/j.parco.2009.09.001) and log₂ nodes
        hops over the network; the shorter counts, as in NCCL's own cost model. Between the ranks of a host nothing
        crosses the network.
        """
        world, nodes = (collective.ranks, 1) if collective.ranks else (self.world, self.nodes)
        sent = collective.sent_bytes(self.world)
        crossing = 0.0 if nodes == 1 else 1 / self.gpus_per_node
        over_network = sent * crossing
        over_link = sent - over_network
        rounds = 2 if collective.kind == "all_reduce" else 1
        hops = (nodes - 1) * NETWORK_HOP_S + (world - nodes) * LINK_HOP_S
        if collective.kind == "all_reduce":
            tree = (nodes - 1).bit_length() * NETWORK_HOP_S + (self.gpus_per_node - 1) * LINK_HOP_S
            hops = min(hops, tree)
        return Transfer(
            over_link,
            over_network,
            over_link / (self.link * LINK_EFFICIENCY),
            over_network / (self.network * LINK_EFFICIENCY),
            collective.calls * rounds * hops,
        )
