"""Measure the bandwidth between ranks at launch, and find a link that is far slower than the others.

An all-reduce takes as long as its slowest rank, so it measures the job and does not show which link is slow. Messages
from each rank to the next do, one pair at a time: a link is one direction between two neighbours, compared with the
others of its kind, within hosts or between them; with fewer than two of a kind there is nothing to compare. All
messages use the job's own process group: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.engine.distributed.medians import medians_of_others
from iwm_fast.engine.distributed.messages import meet_all
from iwm_fast.engine.distributed.rank_info import RankInfo
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.engine.distributed.watchdog import Liveness

__all__ = ["AllReduce", "Interconnect", "Link", "far_below", "measure_interconnect"]

_MIB = 2**20
_SIZES = (4, _MIB, 16 * _MIB)  # bytes: one element measures the latency
_REPEATS = 3  # the best counts: another process may have used the core or the link
# Healthy links of one kind differ by less than 2 ×; a cable or driver that fell back to a slower mode by 10 × and more.
_FAR_BELOW = 0.1
# The first NCCL message of a thousand ranks takes half a minute, later ones milliseconds.
_SILENT_S = 120.0
_CHECK = "check of the interconnect"


@dataclass(frozen=True)
class AllReduce:
    """One size: seconds, and bytes/s that each rank sent and received, 2 (W - 1) / W of the size."""

    bytes: int
    seconds: float
    bytes_per_s: float


@dataclass(frozen=True)
class Link:
    """A link from one rank to the next."""

    source: int
    target: int
    between_hosts: bool
    bytes_per_s: float


@dataclass(frozen=True)
class Interconnect:
    """All measurements."""

    backend: str
    all_reduce: tuple[AllReduce, ...]
    links: tuple[Link, ...]

    def document(self) -> dict[str, Any]:
        """For RUN/environment.json."""
        return asdict(self)


def measure_interconnect(ranks: Ranks, live: Liveness, silent_s: float) -> Interconnect | None:
    """Time messages between all ranks, in about a second; all ranks call it. Returns None where the rank is alone.

    A rank that does not respond within ``silent_s``, or two minutes if that is less, ends every rank and is named; of a
    dead link both ends are.
    """
    if ranks.world == 1:
        return None
    with live.within(min(silent_s, _SILENT_S)):
        buffer = torch.zeros(max(_SIZES) // 4, device=ranks.device)
        if ranks.control is not None:
            # NCCL wants all ranks in a group's first message.
            live.at(f"{_CHECK}, first all-reduce over NCCL (NCCL_DEBUG=INFO says more)")
            dist.all_reduce(buffer[:1])
            _finish(ranks)
        arrived = [_received(ranks, buffer, turn, live) for turn in range(2 + ranks.world % 2)]
        mine = next(seconds for seconds in arrived if seconds is not None)
        reduced = [
            _best(ranks, live, f"all-reduce of {size} bytes", partial(dist.all_reduce, buffer[: size // 4]))
            for size in _SIZES
        ]
        found = gather((mine, reduced), ranks.world, ranks.control)
    share = 2 * (ranks.world - 1) / ranks.world
    slowest = [max(times[place] for _, times in found) for place in range(len(_SIZES))]
    hosts = [info.host for info in ranks.infos]
    sources = [(rank - 1) % ranks.world for rank in range(ranks.world)]
    return Interconnect(
        dist.get_backend(),
        tuple(AllReduce(size, s, share * size / s) for size, s in zip(_SIZES, slowest, strict=True)),
        tuple(
            Link(source, target, hosts[source] != hosts[target], max(_SIZES) / found[target][0])
            for target, source in enumerate(sources)
        ),
    )


def far_below(links: Sequence[Link], infos: Sequence[RankInfo]) -> str | None:
    """One line that names the hosts or ranks whose links give less than a tenth of the median of the others', or None.

    A host, or a rank of one host, that is at two slow links is named alone, as what they have in common.
    """
    slow: list[Link] = []
    usual: list[float] = []
    for between in (True, False):
        alike = [link for link in links if link.between_hosts == between]
        if len(alike) == 1:
            continue
        for link, others in zip(alike, medians_of_others([link.bytes_per_s for link in alike]), strict=True):
            if link.bytes_per_s < _FAR_BELOW * others:
                slow.append(link)
                usual.append(others)
    if not slow:
        return None
    common = Counter(end for link in slow for end in _ends(link, infos))
    named = [end for end, count in common.items() if count > 1]
    named = named or [f"{infos[link.source].name} to {infos[link.target].name}" for link in slow]
    worst = min(range(len(slow)), key=lambda place: slow[place].bytes_per_s)
    speed, others_speed = slow[worst].bytes_per_s / 1e9, usual[worst] / 1e9
    return (
        f"interconnect: {', '.join(named[:3])}{', …' if len(named) > 3 else ''}: messages at {speed:.3g} GB/s, "
        f"the others' at {others_speed:.3g} GB/s; every step waits for it"
    )


def _ends(link: Link, infos: Sequence[RankInfo]) -> tuple[str, str]:
    first, second = infos[link.source], infos[link.target]
    return (first.host, second.host) if link.between_hosts else (first.name, second.name)


def _received(ranks: Ranks, buffer: torch.Tensor, turn: int, live: Liveness) -> float | None:
    """Best seconds of a message from the rank before to this one, in the turn in which it sends; None in other turns.

    Every rank is at one link at most in a turn: even ranks send, odd ranks send, and of an odd number the last.
    """
    before, after = (ranks.rank - 1) % ranks.world, (ranks.rank + 1) % ranks.world
    if _turn(ranks.rank, ranks.world) == turn:
        where = f"message to {ranks.infos[after].name}"
        _best(ranks, live, where, lambda: _transfer(dist.P2POp(dist.isend, buffer, after)))
    elif _turn(before, ranks.world) == turn:
        where = f"message from {ranks.infos[before].name}"
        return _best(ranks, live, where, lambda: _transfer(dist.P2POp(dist.irecv, buffer, before)))
    else:
        _best(ranks, live, "messages of others", lambda: None)
    return None


def _turn(sender: int, world: int) -> int:
    return 2 if world % 2 and sender == world - 1 else sender % 2


def _transfer(operation: dist.P2POp) -> None:
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


def _best(ranks: Ranks, live: Liveness, where: str, message: Callable[[], Any]) -> float:
    """The least seconds of several calls, after one that opens the connection; all ranks begin each together.

    Where a message is never received, its two ends stay in it, and all others wait for them.
    """
    best = float("inf")
    for repeat in range(_REPEATS + 1):
        meet_all(ranks.world, ranks.control)
        live.at(f"{_CHECK}, {where}")
        begin = time.perf_counter()
        message()
        _finish(ranks)
        if repeat:
            best = min(best, time.perf_counter() - begin)
        live.at(f"{_CHECK}, after {where}")
    return best


def _finish(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
