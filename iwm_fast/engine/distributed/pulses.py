"""Heartbeats of all ranks in the launcher's store, and one diagnosis that all ranks share.

The first rank that suspects another reads everybody's heartbeats, twice, and leaves its diagnosis there for the
others. So a look takes `MOST_CALLS` calls per rank at most, whatever the number of ranks, and no more than
two replies in it grow with that number. A diagnosis that names a rank is final: every rank ends with it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")

__all__ = ["MOST_CALLS", "Diagnosis", "Pulse", "Pulses", "announce", "diagnose", "in_time"]

MOST_CALLS = 10
# A store that takes longer to respond is stopped. Short: a launcher that is cut off ends its ranks after half a minute.
_ANSWER_S = 5.0
# Heartbeats between the two readings.
_BEATS = 4
# Pauses before later readings of another rank's diagnosis, which may wait twice for the launcher's store.
_PAUSES_S = (4.0, 9.0)
_PULSE, _FOUND, _LOOKS = "iwm_fast/pulse", "iwm_fast/lost", "iwm_fast/look"
_MOST_NAMED = 3


@dataclass(frozen=True)
class Pulse:
    """A rank's heartbeat. beats: heartbeats so far; moves: places that its main thread has passed, the last is where;
    last: its last words.
    """

    beats: int = 0
    moves: int = 0
    where: str = ""
    host: str = ""
    pid: int = 0
    last: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What a look found: the lost ranks and the words for them, None where none is lost. turn: counts the looks."""

    turn: int = -1
    words: str | None = None
    lost: tuple[int, ...] = ()


def announce(store: Any, rank: int) -> None:
    """Create what a look reads, one call. Every rank calls it before all of them meet."""
    store.multi_set([f"{_PULSE}/{rank}", _FOUND], [json.dumps(asdict(Pulse())), json.dumps(asdict(Diagnosis()))])


class Pulses:
    """One rank's access to them. Every method raises dist.DistError or TimeoutError where the store is gone."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world

    def publish(self, pulse: Pulse) -> None:
        """Write this rank's heartbeat."""
        self._store.set(f"{_PULSE}/{self._rank}", json.dumps(asdict(pulse)))

    def look(self, beat_s: float) -> Diagnosis:
        """Return the diagnosis of this rank, or of the one that looked first; a rank is lost without a heartbeat in
        four times ``beat_s``.
        """
        found = in_time(self._found)
        if found.words is not None:
            return found
        turn = found.turn + 1
        for attempt in ("first", "second"):  # the rank that looks for all may be lost itself
            if in_time(partial(self._store.add, f"{_LOOKS}/{turn}/{attempt}", 1)) == 1:
                return self._look(turn, beat_s)
            for pause_s in (_BEATS * beat_s + 1.0, *_PAUSES_S):
                time.sleep(pause_s)
                found = in_time(self._found)
                if found.turn >= turn:
                    return found
        return Diagnosis(turn)

    def _look(self, turn: int, beat_s: float) -> Diagnosis:
        before = in_time(self._read)
        time.sleep(_BEATS * beat_s)
        after = in_time(self._read)
        words, lost = diagnose(before, after, self._rank)
        found = Diagnosis(turn, words, lost)
        in_time(lambda: self._store.set(_FOUND, json.dumps(asdict(found))))
        return found

    def _found(self) -> Diagnosis:
        fields = json.loads(self._store.get(_FOUND))
        return Diagnosis(fields["turn"], fields["words"], tuple(fields["lost"]))

    def _read(self) -> list[Pulse]:
        keys = [f"{_PULSE}/{rank}" for rank in range(self._world)]
        return [Pulse(**json.loads(text)) for text in self._store.multi_get(keys)]


def diagnose(before: Sequence[Pulse], after: Sequence[Pulse], looker: int) -> tuple[str | None, tuple[int, ...]]:
    """Return (words, lost ranks) from two readings of all ranks' heartbeats; (None, ()) where none is lost.

    Without a new heartbeat a rank has ended, if it left words, or is gone or stopped. With heartbeats of all, those
    that are behind the others hang.
    """
    silent = [r for r, pulse in enumerate(after) if r != looker and pulse.beats == before[r].beats]
    ended: dict[str, list[int]] = defaultdict(list)
    for rank in silent:
        if words := after[rank].last:
            ended[words].append(rank)
    if ended:
        said = [f"{_named(ranks, after, 'has ended', 'have ended')}: {words}" for words, ranks in ended.items()]
        more = f"; {len(said) - _MOST_NAMED} more have ended" if len(said) > _MOST_NAMED else ""
        return "; ".join(said[:_MOST_NAMED]) + more, tuple(rank for ranks in ended.values() for rank in ranks)
    if silent:
        shared = "; look for what they share: a switch, power, a file system" if len(silent) > _MOST_NAMED else ""
        return _named(silent, after, "is gone or stopped", "are gone or stopped") + shared, tuple(silent)
    moves = [pulse.moves for pulse in after]
    behind = [rank for rank, count in enumerate(moves) if count == min(moves)]
    if len(behind) == len(moves):
        return None, ()
    return _named(behind, after, "hangs", "hang"), tuple(behind)


def _named(ranks: Sequence[int], pulses: Sequence[Pulse], one: str, several: str) -> str:
    """Up to three ranks by name; more by their hosts, if those have no other ranks; else the first three of them."""
    if len(ranks) <= _MOST_NAMED:
        return "; ".join(f"{_name(rank, pulses[rank])} {one}" for rank in ranks)
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, pulse in enumerate(pulses):
        hosts[pulse.host].append(rank)
    chosen = set(ranks)
    whole = [host for host, own in hosts.items() if host and chosen.issuperset(own)]
    first = pulses[ranks[0]]
    seen = f", last seen in {first.where}" if {pulses[rank].where for rank in ranks} == {first.where} else ""
    if len(ranks) == len(pulses) or sum(len(hosts[host]) for host in whole) < len(ranks):
        some = ", ".join(f"rank {rank} on {pulses[rank].host}" for rank in ranks[:_MOST_NAMED])
        return f"{len(ranks)} of {len(pulses)} ranks ({some}, …{seen}) {several}"
    if len(whole) == 1:
        return f"host {whole[0]} ({_ranges(ranks)}{seen}) {one}"
    some = ", ".join(whole) if len(whole) <= _MOST_NAMED else f"{whole[0]} … {whole[-1]}"
    return f"{len(whole)} of {len(hosts)} hosts ({some}; {_ranges(ranks)}{seen}) {several}"


def _name(rank: int, pulse: Pulse) -> str:
    if not pulse.beats:
        return f"rank {rank}"
    return f"rank {rank} (host {pulse.host}, pid {pulse.pid}, last seen in {pulse.where})"


def _ranges(ranks: Sequence[int]) -> str:
    """``ranks 24 to 31``, or the first three runs of consecutive ranks."""
    starts = [i for i in range(len(ranks)) if i == 0 or ranks[i] != ranks[i - 1] + 1]
    runs = [ranks[a:b] for a, b in zip(starts, [*starts[1:], len(ranks)], strict=True)]
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"ranks {', '.join(said[:_MOST_NAMED])}{', …' if len(said) > _MOST_NAMED else ''}"


def in_time(call: Callable[[], Answer]) -> Answer:
    """Return the result of a call on the launcher's store; TimeoutError where it does not respond."""
    found: list[Answer] = []
    failed: list[dist.DistError] = []

    def ask() -> None:
        try:
            found.append(call())
        except dist.DistError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"the store has not answered within {_ANSWER_S:g} s")
    return found[0]
