"""How long a collective takes between GPUs that a fast link joins within a host and a network between hosts."""

from __future__ import annotations

from dataclasses import dataclass

from iwm_fast.cost.communication import Collective, ring_bytes

__all__ = ["Fabric", "Transfer"]

# Assumed, because nothing was measured: the share of a link's data-sheet rate that large messages reach, and the
# seconds of one hop. They are printed with every plan.
LINK_EFFICIENCY = 0.8
LINK_HOP_S, NETWORK_HOP_S = 3e-6, 10e-6


@dataclass(frozen=True)
class Transfer:
    """A collective's bytes that one rank sends over each link, and its seconds: over both at once, plus the hops'."""

    link_bytes: float
    network_bytes: float
    link_s: float
    network_s: float
    latency_s: float

    @property
    def seconds(self) -> float:
        """The slower link decides: rings stream through both."""
        return max(self.link_s, self.network_s) + self.latency_s


@dataclass(frozen=True)
class Fabric:
    """nodes hosts of gpus_per_node GPUs; link and network: bytes a second of one GPU in one direction."""

    nodes: int
    gpus_per_node: int
    link: float
    network: float

    @property
    def world(self) -> int:
        """Ranks, one a GPU."""
        return self.nodes * self.gpus_per_node

    def transfer(self, collective: Collective) -> Transfer:
        """By rings through all GPUs, one for each GPU of a host, each entering and leaving a host once.

        So of what a GPU sends, one part in gpus_per_node crosses the network and the rest stays within the host.
        Hops: (W − 1) a round, of which (nodes − 1) over the network (as in NCCL's own cost model).
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
