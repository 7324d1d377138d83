"""Ranks that check a checkpoint together: threads in place of processes, and messages through a barrier."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint import shared_check, writer
from iwm_fast.engine.checkpoint.paths import named, whole_checkpoint
from iwm_fast.engine.checkpoint.shared_check import choose_together, share_of
from iwm_fast.engine.distributed import ranks as ranks_module
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError


@pytest.fixture
def together(monkeypatch):
    """Call a function on all ranks at once; return their results or errors, and what each hashed."""

    def call(world, work):
        barrier, held, hashed = threading.Barrier(world, timeout=60), [b""] * world, [[] for _ in range(world)]
        own = threading.local()
        plain = checkpoint.file_sum

        def met(mine, rank, count, _group=None):
            assert count == world
            barrier.wait()
            held[rank] = mine
            barrier.wait()
            return list(held)

        def first(mine, rank, count, group=None):
            return met(mine, rank, count, group)[0]

        def noted(path):
            hashed[own.rank].append(path.name)
            return plain(path)

        monkeypatch.setattr(shared_check, "bytes_of_first", first)
        monkeypatch.setattr(ranks_module, "bytes_of_first", first)
        monkeypatch.setattr(
            shared_check, "reports_to_first", lambda mine, rank, *more: met(mine, rank, *more) if rank == 0 else
            (met(mine, rank, *more), [])[1]
        )  # fmt: skip
        monkeypatch.setattr(checkpoint, "file_sum", noted)
        infos = tuple(SimpleNamespace(name=f"rank {rank} (host n{rank})") for rank in range(world))

        def of(rank):
            own.rank = rank
            try:
                return work(Ranks(rank, world, rank, world, torch.device("cpu"), infos=infos))
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(of, range(world))), hashed

    return call


def newest(run, ranks, said=None):
    say = (said if said is not None else []).append
    return choose_together(ranks, lambda fault: whole_checkpoint(named(run), say=say, fault=fault))


def made(tmp_path, world, *steps):
    """Checkpoints of a tensor of which each of ``world`` ranks wrote an equal part."""
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    part = torch.arange(101.0)
    shapes = {"weight/a": [101 * world]}
    for step in steps:
        partial = root / ".partial"
        partial.mkdir()
        reports = [
            writer._write_rank(
                partial,
                step,
                [checkpoint.Fragment("weight", "a", (101 * world,), 101 * rank, part + rank)],
                Ranks(rank, world, rank, world, torch.device("cpu")),
                shapes,
            )
            for rank in range(world)
        ]
        meta = {"format": checkpoint.FORMAT, "step": step, "updates": step}
        assert writer._finish(partial, root / f"step_{step:06d}", meta, shapes, reports, 3, None) is None
    return [root / f"step_{step:06d}" for step in steps]


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rank_hashes_an_equal_share_of_a_checkpoint_of_any_number_of_ranks(tmp_path, together, world):
    (path,) = made(tmp_path, 7, 3)
    found, hashed = together(world, lambda ranks: newest(tmp_path / "run", ranks))
    assert found == [(path, None)] * world
    assert sorted(chain(*hashed)) == sorted(file.name for file in path.iterdir() if file.name != "manifest.json")
    assert max(map(len, hashed)) - min(map(len, hashed)) <= 1


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("world", [2, 4])
def test_a_flipped_byte_in_any_shard_is_named_alike_by_all_ranks(tmp_path, together, world, place):
    (path,) = made(tmp_path, 4, 3)
    flip(path / f"rank_{place:05d}.safetensors")
    found, _ = together(
        world, lambda ranks: choose_together(ranks, lambda fault: whole_checkpoint(named(path), fault=fault))
    )
    wrong = f"rank_{place:05d}.safetensors: its bytes are not those that were written (SHA-256 differs)"
    assert found == [f"{path}: {wrong}; name another checkpoint"] * world


def test_a_damaged_newest_checkpoint_is_skipped_by_all_ranks(tmp_path, together):
    older, newer = made(tmp_path, 3, 3, 4)
    (newer / "rank_00002.safetensors").unlink()
    said = []
    found, _ = together(3, lambda ranks: newest(tmp_path / "run", ranks, said))
    assert found == [(older, None)] * 3
    assert said == [f"skipped a damaged checkpoint: {newer}: rank_00002.safetensors: No such file or directory"]


def test_an_error_of_the_choice_ends_all_ranks(tmp_path, together):
    found, _ = together(3, lambda ranks: newest(tmp_path / "run", ranks))
    assert found == [f"{tmp_path}/run/checkpoints: no whole checkpoint; train the run first"] * 3


def test_what_only_another_host_finds_damaged_is_no_damage_and_names_that_host(tmp_path, together, monkeypatch):
    (path,) = made(tmp_path, 3, 3)
    plain = shared_check.file_fault
    bad = share_of(checkpoint_files(path), 1, 3)[0]

    def fault(path, files):
        seen = threading.current_thread().name
        if bad in files and seen == threads[1]:
            return f"{bad}: Stale file handle"
        return plain(path, files)

    threads = {}

    def work(ranks):
        threads[ranks.rank] = threading.current_thread().name
        return newest(tmp_path / "run", ranks)

    monkeypatch.setattr(shared_check, "file_fault", fault)
    found, _ = together(3, work)
    assert [chosen for chosen, _ in found] == [path] * 3
    (said,) = {said for _, said in found}
    assert said.startswith(
        f"rank 1 (host n1): {path}: {bad}: Stale file handle there, and rank 0 (host n0) reads what was"
    )


def checkpoint_files(path):
    return {file.name: {"bytes": file.stat().st_size} for file in path.iterdir() if file.name != "manifest.json"}


def test_shares_are_dealt_from_the_largest_file_on_and_take_any_manifest():
    files = {"a": {"bytes": 5}, "b": {"bytes": 50}, "c": {"bytes": 20}, "d": "no sums", "e": {}}
    assert [share_of(files, rank, 2) for rank in range(2)] == [["b", "a", "e"], ["c", "d"]]
    assert share_of(files, 6, 7) == []


def test_a_rank_alone_checks_all(tmp_path):
    (path,) = made(tmp_path, 2, 3)
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"))
    assert newest(tmp_path / "run", alone) == (path, None)
    flip(path / "index.json")
    with pytest.raises(UserError, match=r"index\.json: its bytes are not those"):
        newest(tmp_path / "run", alone)
