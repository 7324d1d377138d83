"""The report on connections between ranks: of made-up links, and of real ranks that are well, slow, or silent."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.engine.distributed.links import Link, far_below
from iwm_fast.engine.distributed.rank_info import RankInfo

pytestmark = pytest.mark.slow  # starts ranks, some of them slow

SCRIPT = Path(__file__).parents[1] / "joined_ranks.py"
FIRST = RankInfo(0, "alpha", 10, "nccl", "NVIDIA H100", 8, 8, {})


def ring(hosts, speed):
    """Return ranks on one host each, and the links from each to the next; ``speed`` of (source, target) in bytes/s."""
    infos = [replace(FIRST, rank=rank, host=host) for rank, host in enumerate(hosts)]
    world = len(hosts)
    ends = [(rank, (rank + 1) % world) for rank in range(world)]
    return [Link(a, b, hosts[a] != hosts[b], speed(a, b)) for a, b in ends], infos


def test_a_host_at_both_of_its_slow_links_is_named_alone():
    """Eight GPUs per host: links within a host are much faster than those between, and are not compared with them."""
    hosts = [name for name in ("alpha", "beta", "gamma", "delta") for _ in range(8)]

    def speed(a, b):
        if hosts[a] == hosts[b]:
            return 300e9
        return 0.5e9 if "gamma" in (hosts[a], hosts[b]) else 20e9

    line = far_below(*ring(hosts, speed))
    assert line.startswith("interconnect: gamma: messages at 0.5 GB/s, the others' at ")
    assert not any(name in line for name in ("alpha", "beta", "delta"))


def test_one_slow_direction_is_named_by_its_two_ranks():
    hosts = ["alpha"] * 4 + ["beta"] * 4
    line = far_below(*ring(hosts, lambda a, b: 2e9 if (a, b) == (5, 6) else 300e9))
    assert "rank 5 on beta to rank 6 on beta: messages at 2 GB/s, the others' at 300 GB/s" in line
    line = far_below(*ring(hosts, lambda a, b: 0.1e9 if (a, b) == (7, 0) else 20e9))
    assert "rank 7 on beta to rank 0 on alpha: messages at 0.1 GB/s" in line


def test_a_rank_whose_links_within_its_host_are_slow_is_named():
    line = far_below(*ring(["alpha"] * 8, lambda a, b: 4e9 if 3 in (a, b) else 300e9))
    assert line.startswith("interconnect: rank 3 on alpha: messages at 4 GB/s, the others' at 300 GB/s")


@given(st.lists(st.floats(1.0, 9.9), min_size=2, max_size=20), st.floats(1e6, 1e10), st.data())
def test_links_within_a_factor_of_ten_are_not_spoken_of_whatever_their_speed(spread, scale, data):
    hosts = data.draw(st.lists(st.sampled_from("abc"), min_size=len(spread), max_size=len(spread)))
    assert far_below(*ring(hosts, lambda a, _: scale * spread[a])) is None


def test_a_single_link_between_two_hosts_each_way_has_nothing_else_to_be_compared_with():
    assert far_below(*ring(["alpha", "beta"], lambda *_: 1e6)) is None


def joined(world, how, **more):
    """Return (exit code, standard output, standard error) by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"} | more
        command = [sys.executable, str(SCRIPT), how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen(command, env=os.environ | place, text=True, **pipes))
    try:
        ends = [(*rank.communicate(timeout=300), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(code, out, said) for out, said, code in ends]


@pytest.mark.parametrize("world", [2, 3])
def test_real_ranks_measure_each_link_and_all_of_them_together(world):
    ends = joined(world, "well")
    assert [(code, said) for code, _, said in ends] == [(0, "")] * world  # every rank left its process group
    measured = json.loads(ends[0][1])["measured"]
    assert measured["backend"] == "gloo"
    assert [(link["source"], link["target"]) for link in measured["links"]] == [
        ((rank - 1) % world, rank) for rank in range(world)
    ]
    assert not any(link["between_hosts"] for link in measured["links"])
    assert all(0 < link["bytes_per_s"] < math.inf for link in measured["links"])
    sizes, seconds = zip(*((one["bytes"], one["seconds"]) for one in measured["all_reduce"]), strict=True)
    assert sizes == (4, 2**20, 2**24)
    assert all(0 < s < math.inf for s in seconds)
    for one in measured["all_reduce"]:
        assert one["bytes_per_s"] == pytest.approx(2 * (world - 1) / world * one["bytes"] / one["seconds"])


def test_a_rank_that_sends_slowly_is_named_with_its_host():
    """By a clock that messages advance: half a second for 16 MiB one way, a hundredth of that the other way."""
    ends = joined(2, "slow")
    assert [code for code, _, _ in ends] == [0, 0], ends
    said = json.loads(ends[0][1])["said"]
    host = socket.gethostname()
    assert said.startswith(f"interconnect: rank 1 on {host} to rank 0 on {host}: messages at 0.0336 GB/s, ")
    assert "the others' at 3.36 GB/s" in said


@pytest.mark.parametrize("world", [2, 3])
def test_a_message_that_does_not_come_ends_all_ranks_soon_and_both_its_ends_are_named(world):
    """The last rank's message to the first. Of three, the second waits for both, and is not blamed."""
    ends = joined(world, "hang")
    assert [code for code, _, _ in ends] == [1] * world, ends
    host = socket.gethostname()
    lines = [next(line for line in said.splitlines() if line.startswith("iwm-fast: ")) for _, _, said in ends]
    assert f"check of the interconnect, message from rank {world - 1} on {host}" in lines[0]
    for line in lines[1:2] if world == 3 else []:
        assert f"rank 2 (host {host}, pid" in line
        assert f"last seen in check of the interconnect, message to rank 0 on {host}) hangs" in line
        assert "rank 1 (host" not in line


def test_ranks_that_cannot_connect_say_so_in_a_line():
    ends = joined(2, "well", GLOO_SOCKET_IFNAME="nowhere0")
    for code, _, said in ends:
        assert code == 1
        assert "UserError: rank" in said
        assert "no connection to the other ranks" in said
        assert "GLOO_SOCKET_IFNAME" in said
