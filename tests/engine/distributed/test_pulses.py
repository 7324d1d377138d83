"""The look at all ranks' heartbeats: who is named, in which words, and who reads them."""

import statistics
import threading
from dataclasses import replace

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.engine.distributed import pulses
from iwm_fast.engine.distributed.medians import medians_of_others
from iwm_fast.engine.distributed.pulses import Pulse, Pulses, announce, diagnose

ALIVE = [Pulse(5, 7, "step 3", f"h{rank // 8}", 100 + rank) for rank in range(64)]


NINE = "rank 9 (host h1, pid 109, last seen in step 3)"
SHARED = "; look for what they share: a switch, power, a file system"


def after(**changes):
    """Return a second reading in which all are alive, but for ``silent`` ranks, and ``behind`` ones."""
    found = [replace(pulse, beats=9) for pulse in ALIVE]
    for rank in changes.get("silent", ()):
        found[rank] = replace(ALIVE[rank], last=changes.get("last"))
    for rank in changes.get("behind", ()):
        found[rank] = replace(found[rank], moves=6, where="step 2")
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"silent": [9]}, "rank 9 (host h1, pid 109, last seen in step 3) is gone or stopped"),
        (
            {"silent": [9, 20], "last": "UserError: the disk is full"},
            f"{NINE} has ended; rank 20 (host h2, pid 120, last seen in step 3) has ended: UserError: the disk is full",
        ),
        ({"behind": [63]}, "rank 63 (host h7, pid 163, last seen in step 2) hangs"),
        ({"behind": range(8, 24)}, "2 of 8 hosts (h1, h2; ranks 8 to 23, last seen in step 2) hang"),
        (
            {"silent": [1, 3, 4, 5, 9]},
            "5 of 64 ranks (rank 1 on h0, rank 3 on h0, rank 4 on h0, …, last seen in step 3) are gone or stopped"
            + SHARED,
        ),
        (
            {"silent": range(8, 40), "last": "UserError: the disk is full"},
            "4 of 8 hosts (h1 … h4; ranks 8 to 39, last seen in step 3) have ended: UserError: the disk is full",
        ),
        (
            {"silent": range(56, 64)},
            "host h7 (ranks 56 to 63, last seen in step 3) is gone or stopped" + SHARED,
        ),
    ],
)
def test_lost_ranks_are_named_by_rank_host_or_number(changes, words):
    assert diagnose(ALIVE, after(**changes), 0)[0] == words


def test_the_looker_is_alive_though_its_own_heartbeat_is_late():
    assert diagnose(ALIVE, after(silent=[12]), 12) == (None, ())


def test_a_rank_that_has_not_begun_to_send_heartbeats_is_named_without_its_host():
    before = [Pulse(), *ALIVE[1:]]
    assert diagnose(before, [Pulse(), *after()[1:]], 1)[0] == "rank 0 is gone or stopped"


def looking(world, alive, monkeypatch):
    """Return the diagnoses of the ranks that live, all looking at once over one real store."""
    monkeypatch.setattr(pulses.time, "sleep", lambda _: threading.Event().wait(0.05))
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.PrefixStore("iwm_fast", server.clone()) for _ in range(world)]
    for rank in range(world):
        announce(stores[rank], rank)
    ranks = [Pulses(store, rank, world) for rank, store in enumerate(stores)]
    over = threading.Event()

    def beat():
        beats = 0
        while not over.wait(0.01):
            beats += 1
            for rank in alive:
                Pulses(dist.PrefixStore("iwm_fast", server), rank, world).publish(Pulse(beats, 1, "step 1", "h", rank))

    found = {}
    ranks[0].server = server  # which must live as long as they do
    threads = [threading.Thread(target=lambda r=rank: found.update({r: ranks[r].look(0.1)})) for rank in alive]
    heart = threading.Thread(target=beat)
    for thread in (heart, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    over.set()
    heart.join(60)
    return found, ranks


def test_ranks_that_look_together_share_one_diagnosis_and_it_is_final(monkeypatch):
    found, ranks = looking(5, [0, 2, 3, 4], monkeypatch)
    assert len(found) == 4
    assert {(one.turn, one.words, one.lost) for one in found.values()} == {(0, "rank 1 is gone or stopped", (1,))}
    assert ranks[1].look(0.1) == found[0]  # it wakes up


def test_a_look_that_finds_nobody_lost_does_not_answer_a_later_one(monkeypatch):
    found, ranks = looking(3, [0, 1, 2], monkeypatch)
    assert all(one.words is None for one in found.values())
    later = ranks[0].look(0.1)  # by now no rank sends heartbeats
    assert later.turn > max(one.turn for one in found.values())
    assert later.words == (
        "rank 1 (host h, pid 1, last seen in step 1) is gone or stopped; "
        "rank 2 (host h, pid 2, last seen in step 1) is gone or stopped"
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_medians_of_the_others_equal_those_computed_one_by_one(values):
    expected = [statistics.median(values[:i] + values[i + 1 :]) for i in range(len(values))]
    assert medians_of_others(values) == pytest.approx(expected, abs=1e-9)
