"""The meeting of 1,024 simulated ranks, and their look at each other when some are lost: the real code, on threads."""

import datetime
import os
import threading

import pytest
import torch

from iwm_fast.benchmarks.simulated_ranks.counted_store import CountedStore
from iwm_fast.benchmarks.simulated_ranks.simulated import PER_HOST, at_once, described
from iwm_fast.engine.distributed import watchdog
from iwm_fast.engine.distributed.pulses import MOST_CALLS, announce
from iwm_fast.engine.distributed.rank_info import meet
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.distributed.watchdog import Liveness

WORLD = 1024
INFOS = described(WORLD)


@pytest.mark.slow
def test_a_thousand_ranks_meet_with_a_constant_number_of_calls_each():
    store = CountedStore()
    met = at_once(WORLD, lambda rank: meet(store.of(rank), INFOS[rank], WORLD, datetime.timedelta(seconds=120)))
    assert all(infos == INFOS for infos in met)
    assert max(store.calls.values()) <= 4
    assert sum(store.keys_read.values()) == WORLD + (WORLD - 1)  # the first reads all, the others one text


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named_to_all_who_did():
    store, absent = CountedStore(), {5, *range(512, 520)}
    there = [rank for rank in range(WORLD) if rank not in absent]

    def try_to_meet(i):
        with pytest.raises(watchdog.UserError) as error:
            meet(store.of(there[i]), INFOS[there[i]], WORLD, datetime.timedelta(seconds=2))
        return str(error.value)

    said = at_once(len(there), try_to_meet)
    (line,) = {line.partition(": ")[2] for line in said}
    assert line.startswith("rank(s) 5, 512, 513, 514, 515, 516, 517, 518, 519 of 1024 did not connect within 2 s; look")
    assert sum(store.calls.values()) < 5 * WORLD


class Simulated:
    """All ranks' `Liveness` over one store. One thread sends all heartbeats: two per rank would take minutes."""

    def __init__(self, monkeypatch):
        for thread in ("_pulse", "_watch"):
            monkeypatch.setattr(Liveness, thread, lambda _: None)
        self.store = CountedStore()
        for rank in range(WORLD):
            announce(self.store.of(rank), rank)
        self.lives = []
        for rank in range(WORLD):
            place = (rank, WORLD, rank % PER_HOST, PER_HOST, torch.device("cpu"))
            ranks = Ranks(*place, infos=INFOS, store=self.store.of(rank))
            self.lives.append(Liveness(ranks, 10.0))
            self.lives[-1].at("forward of step 7")
            self.lives[-1]._publish()
        self.alive, self.over = set(range(WORLD)), threading.Event()
        self.heart = threading.Thread(target=self._beat, daemon=True)
        self.heart.start()
        self.said = {}
        monkeypatch.setattr(watchdog.os, "_exit", self._exit)
        monkeypatch.setattr(watchdog, "print", self._hear, raising=False)

    @staticmethod
    def _exit(code):
        raise SystemExit(code)

    def _hear(self, line, **_):
        program, rank, words = line.split(": ", 2)
        assert program == "iwm-fast"
        self.said[int(rank.removeprefix("rank "))] = words

    def lose(self, ranks):
        """Their heartbeats end."""
        self.alive = self.alive.difference(ranks)

    def _beat(self):
        while not self.over.wait(0.5):
            for rank in self.alive:
                self.lives[rank]._publish()

    def look(self, ranks):
        """Let these ranks look, all at once, and end."""
        self.store.reset()

        def end(i):
            with pytest.raises(SystemExit):
                self.lives[ranks[i]]._end()

        at_once(len(ranks), end)

    def close(self):
        self.over.set()
        self.heart.join(60)


@pytest.fixture
def simulated(monkeypatch):
    ranks = Simulated(monkeypatch)
    yield ranks
    ranks.close()


SHARED = "; look for what they share: a switch, power, a file system; "
ONE = "rank 517 (host node064, pid {pid}, last seen in forward of step 7) is gone or stopped; "
HOST = "host node064 (ranks 512 to 519, last seen in forward of step 7) is gone or stopped" + SHARED
SWITCH = (
    "64 of 128 hosts (node064 … node127; ranks 512 to 1023, last seen in forward of step 7) are gone or stopped"
    + SHARED
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "words"),
    [([517], ONE), (range(512, 520), HOST), (range(512, 1024), SWITCH)],
    ids=["a rank", "a host", "a switch"],
)
@pytest.mark.parametrize("first_looker", ["lives", "is lost"])
def test_a_thousand_ranks_that_look_at_once_agree_on_who_is_lost(lost, words, first_looker, simulated):
    simulated.lose(lost)
    if first_looker == "is lost":  # it had begun to look for all
        simulated.store.of(lost[0]).add("iwm_fast/look/0/first", 1)
    left = [rank for rank in range(WORLD) if rank not in set(lost)]
    simulated.look(left)
    assert sorted(simulated.said) == left
    assert set(simulated.said.values()) == {words.format(pid=os.getpid()) + watchdog._ADVICE}
    assert max(simulated.store.calls.values()) <= MOST_CALLS
    assert sum(simulated.store.keys_read.values()) <= 2 * WORLD + 6 * len(left)


@pytest.mark.slow
def test_ranks_that_hang_or_ended_are_named_once_and_later_lookers_learn_the_same(simulated):
    for rank, live in enumerate(simulated.lives):
        if rank not in (3, 9):
            live.at("backward of step 7")
    simulated.look(range(500))
    simulated.look(range(500, WORLD))
    said = set(simulated.said.values())
    assert len(said) == 1
    (line,) = said
    assert line.startswith("rank 3 (host node000, pid ")
    assert "last seen in forward of step 7) hangs; rank 9 (host node001" in line
    assert max(simulated.store.calls.values()) == 1  # of the later ones
