"""More than two hundred damaged checkpoints: each is detected and named, or gives exactly what was written."""

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from worlds import tiny_config, tiny_model

from iwm_fast.engine.checkpoint import format as checkpoint
from iwm_fast.engine.checkpoint import writer
from iwm_fast.engine.checkpoint.format import Checkpoint, Fragment
from iwm_fast.engine.checkpoint.fragments import restore_module
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError

SEEDS = 20


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


def fragments(model, rank, shift):
    """Return a part of every tensor for each of two ranks: halves of weights and EMAs, a third of both moments."""
    for name, parameter in model.named_parameters():
        target = name.startswith("target_encoder.")
        for kind in ("ema",) if target else ("weight", "exp_avg", "exp_avg_sq"):
            flat = parameter.detach().flatten() + len(kind) + shift
            cut = flat.numel() // (3 if kind.startswith("exp") else 2)
            start, part = (0, flat[:cut]) if rank == 0 else (cut, flat[cut:])
            yield Fragment(kind, name, tuple(parameter.shape), start, part)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write two checkpoints of two ranks each; return them, their model, and the newer one's tensors."""
    root = tmp_path_factory.mktemp("whole")
    model, _ = tiny_model(tiny_config())
    for step in (1, 2):
        final = root / f"step_{step:06d}"
        partial = root / f".{final.name}.partial"
        partial.mkdir()
        parts = [list(fragments(model, r, 0.5 * step)) for r in (0, 1)]
        shapes = {f"{part.kind}/{part.name}": list(part.shape) for part in parts[0]}
        reports = [writer._write_rank(partial, step, parts[r], Ranks(r, 2, r, 2, "cpu"), shapes) for r in (0, 1)]
        meta = {"format": checkpoint.FORMAT, "step": step, "updates": step}
        assert writer._finish(partial, final, meta, shapes, reports, 3, None) is None
    return root, model, everything(root / "step_000002", model)


def everything(path, model):
    """Read what a resume would read, through the functions that it uses."""
    saved = Checkpoint(path)
    restore_module(model, saved)
    return {key: saved.full(*key.split("/", 1)) for key in sorted(saved.shapes)} | {"updates": saved.updates}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def shards(path):
    return sorted(path.glob("*.safetensors"))


def resum(path):
    """Recompute the checksums, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for file in manifest["files"]:
        if (path / file).exists():
            content = (path / file).read_bytes()
            manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip(path, draw):
    file = draw.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(path, draw):
    file = draw.choice(sorted(path.iterdir()))
    os.truncate(file, draw.randrange(file.stat().st_size))


def lengthen(path, draw):
    with draw.choice(sorted(path.iterdir())).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))


def remove(path, draw):
    draw.choice(sorted(path.iterdir())).unlink()


def empty(path, draw):
    draw.choice(sorted(path.iterdir())).write_bytes(b"")


def swap(path, draw):
    """Swap the two ranks' shards, or a shard and that of another step; half of the time with matching checksums."""
    one = draw.choice(shards(path))
    other = draw.choice([s for s in (*shards(path), path.parent / "step_000001" / one.name) if s != one])
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    if other.parent == path:
        other.write_bytes(content)
    if draw.random() < 0.5:
        resum(path)


def edit_index(path, draw):
    """Make one structural change to the index, with matching checksums."""
    index = json.loads((path / "index.json").read_text())
    pieces, dealt = index["fragments"], index["dealt"]
    assert pieces
    assert dealt
    tensor, other = draw.choice(sorted(pieces)), draw.choice(sorted(dealt))
    parts, at = pieces[tensor], draw.randrange(2)
    shape = draw.choice(sorted(index["shapes"]))
    file = draw.choice(sorted(index["headers"]))
    odd = [None, "7", -1, 2**70, 1.5, True, [], {}]

    def exchange():
        parts[0][2], parts[1][2] = 1, 0

    draw.choice(
        [
            lambda: parts.__delitem__(at),
            lambda: parts.append(parts[at]),
            lambda: parts[at].__setitem__(0, parts[at][0] + draw.choice([-3, -1, 1, 5])),
            lambda: parts[at].__setitem__(1, parts[at][1] + draw.choice([-1, 1])),
            lambda: parts[at].__setitem__(draw.randrange(3), draw.choice(odd)),
            lambda: parts[at].__setitem__(2, draw.choice([2, 3])),
            exchange,
            lambda: pieces.__setitem__(tensor, draw.choice(odd)),
            lambda: pieces.pop(tensor),
            lambda: dealt.pop(other),
            lambda: dealt.__setitem__(other, draw.choice([*odd, dealt[other] + 1, 0])),
            lambda: dealt.__setitem__(tensor, 7),
            lambda: pieces.__setitem__(other, [[0, 1, 0]]),
            lambda: index["shapes"].pop(shape),
            lambda: index["shapes"].__setitem__(shape, draw.choice([[0], [1], [2**40], "x", None, [-1], [1.0]])),
            lambda: index["headers"].__setitem__(file, draw.choice([None, 7, "0" * 64])),
            lambda: index.pop(draw.choice(["format", "step", "updates", "shapes", "fragments", "dealt", "shards"])),
            lambda: index.__setitem__(draw.choice(["step", "updates"]), draw.choice([None, "7", -1, 1.5, True])),
            lambda: index.__setitem__("shards", draw.choice([*odd, 1, 3, 10**12])),
        ]
    )()
    (path / "index.json").write_text(json.dumps(index))
    resum(path)


def edit_manifest(path, draw):
    manifest = json.loads((path / "manifest.json").read_text())
    file = draw.choice(sorted(manifest["files"]))
    draw.choice(
        [
            lambda: manifest["files"].clear(),  # noqa: PLW0108
            lambda: manifest["files"].pop(file),
            lambda: manifest["files"].__setitem__(file, None),
            lambda: manifest["files"].__setitem__("../" + file, manifest["files"].pop(file)),
            lambda: manifest["files"].__setitem__("\0", {}),
            lambda: manifest.__setitem__("files", draw.choice([None, [], [1], "x"])),
            lambda: manifest.pop("format"),
        ]
    )()
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_json(path, draw):
    """Write JSON, or nearly, that no checkpoint has; half of the time with matching checksums."""
    text = draw.choice(["", "null", "[]", "{}", "[" * 100_000, "\ufeff{}", '{"format": 1e999}', "\udce9"])
    (path / draw.choice(["index.json", "manifest.json"])).write_text(text, errors="surrogateescape")
    if draw.random() < 0.5:
        try:
            resum(path)
        except (ValueError, KeyError, TypeError, RecursionError):
            return


def rename(path, draw):
    """Give the older checkpoint the newer one's name."""
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step_000001", path)


HARMS = [flip, truncate, lengthen, remove, empty, swap, edit_index, edit_manifest, replace_json, rename]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_damage_is_detected_and_named_or_harmless(harm, written, tmp_path):
    whole, model, expected = written
    detected = 0
    for seed in range(SEEDS if harm is not edit_index else 3 * SEEDS):
        root = tmp_path / str(seed)
        shutil.copytree(whole, root)
        path = root / "step_000002"
        harm(path, random.Random(seed))
        wrong = checkpoint.damage(path)
        if wrong is None:
            assert same(everything(path, model), expected), seed
            continue
        detected += 1
        found, passed = checkpoint.newest(root)
        assert found == root / "step_000001"
        assert len(passed) == 1
        assert passed[0].startswith(f"{path}: ")
        assert "\n" not in passed[0]
        assert any(word in passed[0] for word in ("rank_0000", "index.json", "manifest.json"))
        shutil.rmtree(root)
    assert detected


@pytest.mark.parametrize("place", ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "manifest.json"])
@pytest.mark.parametrize("summed", [True, False])
def test_a_planted_pickle_is_named_and_never_run(place, summed, written, tmp_path):
    whole, _, _ = written
    root, mark = tmp_path / "root", tmp_path / "it_ran"
    shutil.copytree(whole, root)
    trap = pickle.dumps(Trap(str(mark)))
    (root / "step_000002" / place).write_bytes(trap)
    if summed and place != "manifest.json":
        resum(root / "step_000002")
    found, passed = checkpoint.newest(root)
    assert found == root / "step_000001"
    assert place in passed[0]
    if place != "manifest.json":  # the manifest only decides whether the rest may be read
        with pytest.raises(UserError):
            everything(root / "step_000002", tiny_model(tiny_config())[0])
    assert not mark.exists()
    pickle.loads(trap)  # the trap works
    assert mark.exists()


def test_pickles_beside_a_checkpoint_are_never_opened(written, tmp_path):
    whole, model, expected = written
    root, mark = tmp_path / "root", tmp_path / "it_ran"
    shutil.copytree(whole, root)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "index.pkl"):
        (root / "step_000002" / name).write_bytes(pickle.dumps(Trap(str(mark))))
    (root / "latest").write_bytes(pickle.dumps(Trap(str(mark))))
    assert checkpoint.newest(root) == (root / "step_000002", [])
    assert same(everything(root / "step_000002", model), expected)
    assert not mark.exists()
