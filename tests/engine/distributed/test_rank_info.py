"""A launch that cannot work ends on every rank with one line that names the host."""

import datetime
import re
import threading
from dataclasses import replace

import pytest
import torch.distributed as dist

from iwm_fast.engine.distributed import ranks as distributed
from iwm_fast.engine.distributed.rank_info import RankInfo, meet, require_alike, require_shared, this_rank
from iwm_fast.errors import UserError

SHORT = datetime.timedelta(seconds=3)
FIRST = RankInfo(0, "alpha", 10, "nccl", "NVIDIA H100", 8, 8, {"torch": "2.13.0", "deepspeed": "0.19.8"}, "GPU-1")
SECOND = replace(FIRST, rank=1, host="beta", gpu="GPU-2")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            replace(SECOND, backend="gloo", device="cpu", devices=0),
            r"rank 1 on beta runs on cpu \(gloo\), rank 0 on alpha",
        ),
        (replace(SECOND, versions={"torch": "2.12.0", "deepspeed": "0.19.8"}), "rank 1 on beta has torch 2.12.0"),
        (replace(SECOND, versions={"torch": "2.13.0", "deepspeed": None}), "rank 1 on beta has deepspeed None"),
        (replace(SECOND, device="NVIDIA A100"), "rank 1 on beta has a NVIDIA A100, rank 0 on alpha a NVIDIA H100"),
        (replace(SECOND, host="alpha", gpu=FIRST.gpu), "rank 0 on alpha and rank 1 on alpha would share one GPU"),
    ],
)
def test_unlike_ranks_are_refused_by_host(other, words):
    with pytest.raises(UserError, match=words):
        require_alike((FIRST, other))


def test_like_ranks_are_accepted():
    require_alike((FIRST, SECOND))


def together(*calls):
    """Run the calls concurrently, each in a thread; return each one's result or error."""
    found = [None] * len(calls)

    def run(i):
        try:
            found[i] = calls[i]()
        except UserError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def stores(count):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [server, *(dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(count - 1))]


def test_ranks_meet_and_learn_of_each_other():
    both = stores(2)
    found = together(*(lambda r=r: meet(both[r], this_rank(r, 2, "gloo"), 2, SHORT) for r in range(2)))
    assert found[0] == found[1]
    assert [info.rank for info in found[0]] == [0, 1]


def test_unlike_ranks_all_end_with_the_same_line():
    both = stores(2)
    infos = [this_rank(0, 2, "gloo"), replace(this_rank(1, 2, "gloo"), host="beta", versions={"torch": "1.0"})]
    found = together(*(lambda r=r: meet(both[r], infos[r], 2, SHORT) for r in range(2)))
    assert isinstance(found[0], UserError)
    assert str(found[0]) == str(found[1])
    assert "on beta has" in str(found[0])


def test_a_rank_that_does_not_come_is_named():
    (store,) = stores(1)
    with pytest.raises(UserError, match=r"rank\(s\) 1, 2 of 3 did not connect within 3 s"):
        meet(store, this_rank(0, 1, "gloo"), 3, SHORT)


class Gatherer:
    """An all-gather between threads."""

    def __init__(self, world):
        self.barrier, self.values = threading.Barrier(world), [None] * world

    def by(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(10)
            found = list(self.values)
            self.barrier.wait(10)
            return found

        return gather


def test_a_folder_that_is_not_shared_is_refused_and_a_shared_one_left_clean(tmp_path):
    gatherer = Gatherer(2)
    apart = [tmp_path / "a", tmp_path / "b"]
    found = together(*(lambda r=r: require_shared(apart[r], (FIRST, SECOND), r, gatherer.by(r)) for r in range(2)))
    assert all("is not the same folder for rank 1 on beta and rank 0 on alpha" in str(error) for error in found)
    shared = tmp_path / "run"
    assert together(*(lambda r=r: require_shared(shared, (FIRST, SECOND), r, gatherer.by(r)) for r in range(2))) == [
        None,
        None,
    ]
    assert list(shared.iterdir()) == []


def test_a_folder_that_one_rank_cannot_write_is_refused_by_its_host(tmp_path):
    gatherer = Gatherer(2)
    (tmp_path / "file").touch()
    folders = [tmp_path / "run", tmp_path / "file" / "run"]
    found = together(*(lambda r=r: require_shared(folders[r], (FIRST, SECOND), r, gatherer.by(r)) for r in range(2)))
    assert all(str(error).startswith("rank 1 on beta cannot write to") for error in found)


@pytest.mark.parametrize(
    ("address", "added"), [("127.0.0.1", ""), ("no-such-host.invalid", r" \(which is not found here: .*\)")]
)
def test_a_rank_that_waits_long_says_for_whom_and_where(address, added, monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(distributed, "_SILENT_S", 0.01)
    timers = []

    class Recorded(threading.Timer):  # on a busy machine it may have ended before anybody looks for its thread
        def start(self):
            timers.append(self)
            super().start()

    monkeypatch.setattr(threading, "Timer", Recorded)
    for world in (2, 1):
        timers.clear()
        with distributed._waiting(0, world):
            assert len(timers) == world - 1
            for timer in timers:
                timer.join()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.match(rf"rank 0 of 2: waiting for the other ranks at {address}:29500{added}; where none was", said[0])
