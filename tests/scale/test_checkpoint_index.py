"""A checkpoint of 1,024 ranks: what ranks send, the index, and damage to one of its files."""

import json

import pytest
import torch

from iwm_fast.benchmarks.simulated_ranks.simulated import held_by, state_shapes
from iwm_fast.config import load_config, packaged_config
from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint import writer
from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.distributed.ranks import Ranks

pytestmark = pytest.mark.slow  # a million fragments, and a thousand files

WORLD = 1024


@pytest.mark.parametrize(("stage", "largest_report"), [(1, 3_000), (3, 1_000)])
def test_of_a_large_model_ranks_send_kilobytes_and_the_index_is_small(stage, largest_report, tmp_path):
    shapes = state_shapes(load_config(packaged_config("vit_large_p16_224.yaml")))
    held = [held_by(shapes, rank, WORLD, stage) for rank in range(WORLD)]
    reports = [json.dumps(writer.places(own, rank, WORLD, shapes)) for rank, own in enumerate(held)]
    assert sum(len(own) for own in held) > (1_000_000 if stage != 1 else 4_000)
    assert max(map(len, reports)) < largest_report
    dealt, listed = writer.layout(shapes, [json.loads(report) for report in reports])
    index = {"format": checkpoint.FORMAT, "step": 1, "updates": 1, "shards": WORLD, "shapes": shapes}
    path = tmp_path / "index.json"
    path.write_text(json.dumps(index | {"dealt": dealt, "fragments": listed}))
    assert path.stat().st_size < 500_000
    places = checkpoint.read_index(path)
    for rank, (_, expected) in enumerate(places.held()):
        own = {f"{tensor}@{start}": length for tensor, parts in held[rank].items() for start, length in parts}
        assert own == expected


@pytest.mark.parametrize("harm", ["torn", "altered", "missing", "of another step", "header"])
def test_damage_to_one_of_a_thousand_files_is_named(harm, whole):
    path, file = whole, whole / "rank_00777.safetensors"
    before = file.read_bytes()
    content = bytearray(before)
    if harm == "torn":
        file.write_bytes(content[:-3])
    elif harm == "altered":
        content[-2] ^= 8
        file.write_bytes(content)
    elif harm == "header":
        content[12] ^= 1
        file.write_bytes(content)
    elif harm == "missing":
        file.unlink()
    else:
        file.write_bytes(before.replace(b'"step": "1"', b'"step": "2"'))
    assert "rank_00777.safetensors: " in checkpoint.damage(path)
    file.write_bytes(before)
    assert checkpoint.damage(path) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of 1,024 ranks, each with its part of a few small tensors."""
    root = tmp_path_factory.mktemp("many")
    shapes = {"weight/a": (3000,), "weight/b": (5, 7), "ema/a": (3000,)}
    partial, final = root / ".partial", root / "step_000001"
    partial.mkdir()
    reports = []
    for rank in range(WORLD):
        parts = [
            Fragment(*tensor.split("/"), shapes[tensor], start, torch.arange(start, start + length).float())
            for tensor, own in held_by(shapes, rank, WORLD, 3).items()
            for start, length in own
        ]
        ranks = Ranks(rank, WORLD, rank, WORLD, torch.device("cpu"))
        reports.append(json.loads(json.dumps(writer._write_rank(partial, 1, parts, ranks, shapes))))
    meta = {"format": checkpoint.FORMAT, "step": 1, "updates": 1}
    assert writer._finish(partial, final, meta, shapes, reports, 3, None) is None
    return final


def test_a_rank_of_half_as_many_reads_two_files(whole):
    saved, out = Checkpoint(whole), torch.empty(6)
    saved.fill("weight", "a", 6 * 100, out)
    assert torch.equal(out, torch.arange(600, 606).float())
    assert sorted(saved._open) == ["rank_00200.safetensors", "rank_00201.safetensors"]
    assert torch.equal(saved.full("ema", "a"), torch.arange(3000).float())
