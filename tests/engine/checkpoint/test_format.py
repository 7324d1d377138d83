"""Checkpoints: whole or refused, and independent of how the state was sharded."""

import errno
import itertools
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint import writer as checkpoint_writer
from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.checkpoint.writer import CheckpointWriter, clear_leftovers, point_latest, write
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def pieces(name, tensor, cuts):
    edges = [0, *sorted(cuts), tensor.numel()]
    return [
        Fragment("weight", name, tuple(tensor.shape), a, tensor.flatten()[a:b])
        for a, b in itertools.pairwise(edges)
        if b > a
    ]


def save(root, step=1, keep_last=3, value=1.0):
    fragments = pieces("layer", torch.full((4, 3), value), [])
    return write(root, step, fragments, {"updates": step}, ALONE, keep_last)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_range_is_read_back_from_any_division(data, tmp_path_factory):
    numel = data.draw(st.integers(1, 60))
    value = torch.randn(numel)
    cuts = data.draw(st.lists(st.integers(0, numel), max_size=6))
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    root = tmp_path_factory.mktemp("cut")
    path = write(root, 7, pieces("w", value, cuts), {"updates": 7}, ALONE, 1)
    saved = Checkpoint(path)
    out = torch.full((stop - start,), float("nan"))
    saved.fill("weight", "w", start, out)
    assert torch.equal(out, value[start:stop])
    assert torch.equal(saved.full("weight", "w"), value)


def test_a_missing_fragment_is_an_error_not_a_zero(tmp_path):
    path = write(tmp_path, 1, pieces("w", torch.ones(10), [4])[1:], {"updates": 1}, ALONE, 1)
    assert "begins at 4, expected 0" in (checkpoint.damage(path) or "")
    with pytest.raises(UserError, match="begins at 4, expected 0"):
        Checkpoint(path)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, harm):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    shard = next(new.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    if harm == "truncate":
        shard.write_bytes(content[:-5])
    elif harm == "flip":
        content[-3] ^= 4
        shard.write_bytes(content)
    elif harm == "remove":
        shard.unlink()
    else:
        (new / "manifest.json").unlink()
    found, passed = checkpoint.newest(tmp_path)
    assert found == old
    assert len(passed) == 1
    assert str(new) in passed[0]


def test_latest_names_the_newest_and_older_ones_are_pruned(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000004", "step_000005"]
    assert (tmp_path / "latest").read_text() == "step_000005\n"
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_000005", [])


def test_a_full_disk_leaves_nothing_under_a_final_name_and_the_old_one_usable(tmp_path, monkeypatch):
    old = save(tmp_path, 1)

    def full(path, *_):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_shard", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert checkpoint.newest(tmp_path)[0] == old


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, keep_last=1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_writer, "_remove", refuse)
    save(tmp_path, 2, keep_last=1)
    assert "step_000001: old checkpoint not removed (Permission denied" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_000002", [])


def test_a_folder_that_cannot_be_renamed_is_removed_all_the_same(tmp_path, monkeypatch):
    """An overlay file system returns EXDEV for a folder that came with the image."""
    save(tmp_path, 1, keep_last=1)
    real = Path.rename

    def rename(path, target):
        if path.name == "step_000001":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 2, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000002"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_passed_over_as_damaged(tmp_path, monkeypatch, number, file):
    """Otherwise the run would resume from an older one, and train the steps since again."""
    for step in (1, 2):
        save(tmp_path, step)
    real = Path.open

    def opened(path, *arguments, **more):
        if path == tmp_path / "step_000002" / file:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UserError, match=rf"step_000002/{file}: cannot be read \({os.strerror(number)}"):
        checkpoint.newest(tmp_path)


def test_a_leftover_of_a_killed_writer_is_neither_used_nor_in_the_way(tmp_path):
    leftover = tmp_path / ".step_000002.partial"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"torn")
    assert checkpoint.newest(tmp_path) == (None, [])
    written = save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == (written, [])
    assert not leftover.exists()


def test_another_architecture_is_refused_with_the_first_difference(tmp_path):
    saved = Checkpoint(save(tmp_path))
    saved.require_architecture({"layer": (4, 3)})
    with pytest.raises(UserError, match="another architecture: layer is 4×3 there and 4×5"):
        saved.require_architecture({"layer": (4, 5)})
    with pytest.raises(UserError, match="absent"):
        saved.require_architecture({"layer": (4, 3), "more": (1,)})


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = save(tmp_path)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    json.loads((path / "index.json").read_text())


def test_multiples_of_keep_every_are_never_pruned(tmp_path):
    for step in range(1, 8):
        fragments = pieces("layer", torch.ones(4, 3), [])
        write(tmp_path, step, fragments, {"updates": step}, ALONE, keep_last=2, keep_every=3)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{n:06d}" for n in (3, 6, 7)]


def test_training_continues_while_a_checkpoint_is_written_from_a_snapshot(tmp_path, monkeypatch):
    go, plain = threading.Event(), checkpoint_writer.write_shard
    seen = []

    def slow(path, tensors, metadata):
        assert go.wait(60)
        seen.append([tensor.data_ptr() for tensor in tensors.values()])
        return plain(path, tensors, metadata)

    monkeypatch.setattr(checkpoint_writer, "write_shard", slow)
    live = torch.zeros(12)
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=3, keep_every=None)
    writer.save(1, [Fragment("weight", "layer", (12,), 0, live)], {"updates": 1})
    live.fill_(2.0)  # the next step
    assert not list(tmp_path.glob("step_*"))
    assert not writer.failed
    go.set()
    writer.save(2, [Fragment("weight", "layer", (12,), 0, live)], {"updates": 2})  # waits for the first
    assert (tmp_path / "step_000001").exists()
    writer.wait()
    writer.close()
    read = [Checkpoint(tmp_path / f"step_{n:06d}").full("weight", "layer") for n in (1, 2)]
    assert torch.equal(read[0], torch.zeros(12))
    assert torch.equal(read[1], torch.full((12,), 2.0))
    assert seen[0] == seen[1]  # one snapshot buffer, reused


def test_what_the_writer_s_thread_could_not_do_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_shard", full)
    writer = CheckpointWriter(tmp_path, ALONE, keep_last=3, keep_every=None)
    writer.save(1, [Fragment("weight", "layer", (12,), 0, torch.zeros(12))], {"updates": 1})
    while not writer.failed:
        threading.Event().wait(0.01)
    with pytest.raises(UserError, match="No space left"):
        writer.wait()
    writer.close()


def test_a_resume_from_an_older_checkpoint_is_what_auto_finds_afterwards(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    point_latest(tmp_path, "step_000002")
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_000002", "step_000001", "step_000003"]
    save(tmp_path, 3, value=7.0)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_000003", [])
    assert Checkpoint(tmp_path / "step_000003").full("weight", "layer").mean() == 7.0


def test_steps_are_ordered_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step_1000000"


def test_what_killed_writers_left_is_cleared(tmp_path):
    whole = save(tmp_path, 1)
    for name in (".step_000002.partial", ".step_000003.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.safetensors").write_bytes(b"torn")
    (tmp_path / ".frozen.safetensors.partial").write_bytes(b"torn")
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", whole.name]


@pytest.mark.parametrize(("target", "first"), [("step_000001", 1), ("step_000002/", 2), ("nowhere", 3)])
def test_latest_as_a_link_names_its_checkpoint_and_is_replaced_by_the_next(tmp_path, target, first):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(target)
    assert checkpoint.newest(tmp_path) == (tmp_path / f"step_{first:06d}", [])
    save(tmp_path, 4)
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    assert not (tmp_path / "latest").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        "latest", *(f"step_{step:06d}" for step in (2, 3, 4))
    ]  # fmt: skip


def test_a_run_s_folder_that_is_gone_is_not_recreated_elsewhere(tmp_path):
    """As under the mount point of a lost disk."""
    with pytest.raises(UserError, match=r"No such file or directory; the run's folder is gone: look whether its disk"):
        save(tmp_path / "mnt/run/checkpoints")
    assert not (tmp_path / "mnt").exists()
