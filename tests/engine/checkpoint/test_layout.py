"""Where a checkpoint's tensors are: the small index, older ones, and the bytes that a rank reads."""

import json
import math

import pytest
import torch

from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint import writer
from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.checkpoint.index import equal_part
from iwm_fast.engine.checkpoint.shard_file import file_sum, write_shard
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError

SHAPES = {"weight/a": (7, 11), "weight/b": (1,), "exp_avg/a": (7, 11), "ema/c": (64,), "exp_avg/d": (5, 3)}
TENSORS = {key: torch.randn(shape) for key, shape in SHAPES.items()}


def equal_parts(rank, world):
    """As ZeRO stages 0 and 3 divide: each tensor over all ranks."""
    for key, tensor in TENSORS.items():
        part = equal_part(tensor.numel(), world)
        own = tensor.flatten()[rank * part : (rank + 1) * part]
        if own.numel():
            yield fragment(key, rank * part, own)


def slices(rank, world):
    """As ZeRO stages 1 and 2 divide: all tensors in a row."""
    total = sum(tensor.numel() for tensor in TENSORS.values())
    part, at = -(-total // world), 0
    for key, tensor in TENSORS.items():
        a, b = max(rank * part, at), min((rank + 1) * part, at + tensor.numel())
        if a < b:
            yield fragment(key, a - at, tensor.flatten()[a - at : b - at])
        at += tensor.numel()


def fragment(key, start, own):
    kind, name = key.split("/")
    return Fragment(kind, name, SHAPES[key], start, own.contiguous())


def written(root, divide, world, step=3):
    """Write a checkpoint as ``world`` ranks do, one after the other."""
    final, partial = root / f"step_{step:06d}", root / ".partial"
    partial.mkdir()
    ranks = [Ranks(rank, world, rank, world, torch.device("cpu")) for rank in range(world)]
    shapes = {key: list(shape) for key, shape in SHAPES.items()}
    reports = [writer._write_rank(partial, step, list(divide(r.rank, world)), r, shapes) for r in ranks]
    reports = json.loads(json.dumps(reports))
    meta = {"format": checkpoint.FORMAT, "step": step, "updates": step}
    assert writer._finish(partial, final, meta, shapes, reports, 3, None) is None
    return final


def written_by_the_first_format(root, divide, world, step=3):
    """The layout of versions up to 0.1: every fragment in the index."""
    final = root / f"step_{step:06d}"
    final.mkdir(parents=True)
    files, fragments = {}, []
    for rank in range(world):
        parts, file = list(divide(rank, world)), f"rank_{rank:05d}.safetensors"
        metadata = {"format": "iwm-fast-checkpoint/1", "step": str(step), "rank": str(rank)}
        files[file] = write_shard(final / file, {part.key: part.tensor for part in parts}, metadata)
        fragments += [[part.kind, part.name, part.start, part.tensor.numel(), file] for part in parts]
    index = {"format": "iwm-fast-checkpoint/1", "step": step, "updates": step, "shapes": SHAPES, "fragments": fragments}
    (final / "index.json").write_text(json.dumps(index))
    files["index.json"] = file_sum(final / "index.json")
    (final / "manifest.json").write_text(json.dumps({"format": "iwm-fast-checkpoint/1", "files": files}))
    return final


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("divide", [equal_parts, slices])
@pytest.mark.parametrize("write", [written, written_by_the_first_format])
def test_every_tensor_and_every_range_of_it_is_read_back(write, divide, world, tmp_path):
    path = write(tmp_path, divide, world)
    assert checkpoint.damage(path) is None
    assert checkpoint.newest(tmp_path) == (path, [])
    saved = Checkpoint(path)
    for key, tensor in TENSORS.items():
        assert torch.equal(saved.full(*key.split("/")), tensor)
        for start, stop in ((0, 1), (tensor.numel() // 3, tensor.numel()), (tensor.numel() // 2, tensor.numel() // 2)):
            out = torch.full((stop - start,), float("nan"))
            saved.fill(*key.split("/"), start, out)
            assert torch.equal(out, tensor.flatten()[start:stop])


def test_the_index_of_equal_parts_does_not_grow_with_their_number(tmp_path):
    indexes = []
    for world in (4, 40):
        (tmp_path / str(world)).mkdir()
        indexes.append(json.loads((written(tmp_path / str(world), equal_parts, world) / "index.json").read_text()))
    for index in indexes:
        assert index["fragments"] == {}
        assert index["dealt"] == {k: equal_part(math.prod(s), index["shards"]) for k, s in SHAPES.items()}


def test_fragments_are_listed_only_for_tensors_that_are_not_dealt(tmp_path):
    index = json.loads((written(tmp_path, slices, 3) / "index.json").read_text())
    assert index["fragments"]["weight/a"] == [[0, 77, 0]]
    assert index["fragments"]["ema/c"] == [[0, 1, 1], [1, 63, 2]]
    assert index["dealt"] == {"weight/b": 1}  # the first rank happens to hold all of it


@pytest.mark.parametrize(
    ("before", "after"),
    [((equal_parts, 1), (equal_parts, 1)), ((slices, 2), (slices, 3)), ((equal_parts, 4), (equal_parts, 3))],
    ids=["1 to 1", "2 to 3", "4 to 3 at stage 3"],
)
def test_a_rank_reads_its_ranges_and_the_headers_of_their_files_alone(before, after, tmp_path):
    path = written(tmp_path, *before)
    divide, world = after
    headers = {file.name: 8 + int.from_bytes(file.read_bytes()[:8], "little") for file in path.glob("*.safetensors")}
    data = 0
    for rank in range(world):
        saved, own = Checkpoint(path), list(divide(rank, world))
        outs = [torch.empty_like(part.tensor) for part in own]
        saved.fill_all((p.kind, p.name, p.start, out) for p, out in zip(own, outs, strict=True))
        assert all(torch.equal(out, part.tensor) for out, part in zip(outs, own, strict=True))
        mine = 4 * sum(part.tensor.numel() for part in own)
        assert saved.bytes_read == mine + sum(headers[file] for file in saved._open)
        data += mine
    assert data == 4 * sum(tensor.numel() for tensor in TENSORS.values())


def test_a_file_that_changed_since_the_check_is_refused_where_its_header_differs(tmp_path):
    path = written(tmp_path, equal_parts, 2)
    other = {"weight/a@0": torch.zeros(39)}
    write_shard(path / "rank_00000.safetensors", other, {"step": "3"})
    with pytest.raises(UserError, match=r"rank_00000.safetensors: cannot be read \(its header is not the one that was"):
        Checkpoint(path).full("weight", "a")


def test_ranks_that_name_other_tensors_than_the_first_fail_the_checkpoint(tmp_path):
    (tmp_path / ".partial").mkdir()
    ranks = [Ranks(rank, 2, rank, 2, torch.device("cpu")) for rank in range(2)]
    own = [list(equal_parts(rank, 2)) for rank in range(2)]
    tables = [dict(SHAPES), {key: shape for key, shape in SHAPES.items() if key != "ema/c"}]
    own[1] = [part for part in own[1] if part.kind != "ema"]
    reports = [writer._write_rank(tmp_path / ".partial", 1, own[r], ranks[r], tables[r]) for r in range(2)]
    said = writer._finish(tmp_path / ".partial", tmp_path / "step_000001", {}, tables[0], reports, 3, None)
    assert said == "rank 1 names other tensors than rank 0"


def test_more_files_than_a_process_may_open_are_read(tmp_path):
    saved = Checkpoint(written(tmp_path, slices, 200))
    for key, tensor in TENSORS.items():
        assert torch.equal(saved.full(*key.split("/")), tensor)
    assert len(saved._open) <= checkpoint._MOST_OPEN
