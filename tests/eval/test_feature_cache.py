from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import write_images
from worlds import tiny_config, tiny_model

from iwm_fast.config import Config, DataConfig
from iwm_fast.errors import UserError
from iwm_fast.eval import feature_cache as cache_module
from iwm_fast.eval.feature_cache import FeatureCache
from iwm_fast.eval.features import announce, read_features
from iwm_fast.eval.splits import open_splits

CPU = Config(**(dict(tiny_config()) | {"data": DataConfig(device="cpu", threads=1)}))
LENIENT = Config(**(dict(CPU) | {"data": DataConfig(device="cpu", threads=1, max_bad_fraction=1.0)}))


class Counted:
    """A split that counts how often it is read."""

    def __init__(self, split):
        self.split, self.reads = split, 0

    def __getattr__(self, name):
        return getattr(self.split, name)

    def __len__(self):
        return len(self.split)

    def read(self):
        self.reads += 1
        return self.split.read()


@pytest.fixture
def photos(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "photos" / name, 5)
    return tmp_path / "photos"


def opened(photos, config=CPU):
    return Counted(open_splits(photos, config)[0])


@pytest.mark.parametrize("keep", ["pooled", "tokens", "pixels"])
def test_features_are_read_once_and_then_mapped(photos, tmp_path, keep):
    model, _ = tiny_model(CPU)
    cache, split = FeatureCache(tmp_path / "cache"), opened(photos)
    first = read_features([model.target_encoder], split, keep, cache=cache)[0]
    again = read_features([model.target_encoder], opened(photos), keep, cache=cache)[0]
    fresh = read_features([model.target_encoder], split, keep)[0]
    assert isinstance(again.values, np.memmap)
    for found in (first, again):
        np.testing.assert_array_equal(found.values, fresh.values)
        np.testing.assert_array_equal(found.labels, fresh.labels)
    assert split.reads == 2  # the first, and the one without a cache
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [first.values.filename.parent.name]


def test_tokens_and_their_means_are_those_of_the_encoder(photos):
    model, _ = tiny_model(CPU)
    split = opened(photos)
    images = torch.cat([images for images, _ in split.read()])
    with torch.no_grad():
        tokens = model.encode(images, "target")
    kept = read_features([model.target_encoder], split, "tokens")[0].values
    pooled = read_features([model.target_encoder], split, "pooled")[0].values
    assert (kept.dtype, pooled.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(kept, tokens, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(pooled, tokens.mean(dim=1), rtol=1e-5, atol=1e-6)


def test_another_checkpoint_or_another_picture_is_not_served_what_is_old(photos, tmp_path):
    model, _ = tiny_model(CPU)
    cache = FeatureCache(tmp_path / "cache")
    old = np.array(read_features([model.target_encoder], opened(photos), "pooled", cache=cache)[0].values)
    with torch.no_grad():
        next(model.target_encoder.parameters()).add_(0.1)
    split = opened(photos)
    trained = read_features([model.target_encoder], split, "pooled", cache=cache)[0].values
    assert split.reads == 1
    assert not np.allclose(trained, old)
    path, other = (Path(split.files.name(row)) for row in (0, 1))
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1_000_000))
    split = opened(photos)
    replaced = read_features([model.target_encoder], split, "pooled", cache=cache)[0].values
    assert split.reads == 1
    np.testing.assert_array_equal(replaced[0], replaced[1])
    np.testing.assert_array_equal(replaced[1:], trained[1:])


def test_encoders_of_equal_weights_that_rotate_otherwise_have_features_of_their_own(photos, tmp_path):
    cache, found = FeatureCache(tmp_path / "cache"), []
    for base in (100.0, 3.0):
        torch.manual_seed(0)
        config = tiny_config(positions="rope", rope_base=base)
        model, _ = tiny_model(Config(**(dict(config) | {"data": CPU.data})))
        split = opened(photos)
        found.append(np.array(read_features([model.encoder], split, "pooled", cache=cache)[0].values))
        assert split.reads == 1
    assert not np.allclose(*found)


def test_only_the_encoder_that_is_new_is_computed(photos, tmp_path):
    models = [tiny_model(CPU, seed)[0].target_encoder for seed in (0, 1)]
    cache = FeatureCache(tmp_path / "cache")
    read_features(models[:1], opened(photos), "pooled", cache=cache)
    split = opened(photos)
    both = read_features(models, split, "pooled", cache=cache)
    assert split.reads == 1
    for model, found in zip(models, both, strict=True):
        np.testing.assert_array_equal(found.values, read_features([model], split, "pooled")[0].values)


@pytest.mark.parametrize("file", ["values.npy", "labels.npy", "entry.json"])
@pytest.mark.parametrize("harm", ["cut", "gone", "garbage"])
def test_a_damaged_entry_is_computed_anew(photos, tmp_path, file, harm):
    model, _ = tiny_model(CPU)
    cache = FeatureCache(tmp_path / "cache")
    whole = np.array(read_features([model.encoder], opened(photos), "pooled", cache=cache)[0].values)
    path = next((tmp_path / "cache").glob(f"*/{file}"))
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if harm == "cut" else b"\x00garbage")
    again = read_features([model.encoder], opened(photos), "pooled", cache=cache)[0].values
    np.testing.assert_array_equal(again, whole)


def test_what_is_interrupted_leaves_no_entry(photos, tmp_path):
    model, _ = tiny_model(CPU)
    cache = FeatureCache(tmp_path / "cache")

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_features([model.encoder], opened(photos), "pooled", cache=cache, progress=interrupted)
    assert list((tmp_path / "cache").iterdir()) == []


def full_from_the_start(monkeypatch, folder):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    return r"they need 0\.0 MB, 0\.0 MB are free"


def full_when_the_file_is_made(monkeypatch, folder):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    return "No space left on device"


def full_at_the_end(monkeypatch, folder):
    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(FeatureCache, "_publish", full)
    return "Disk quota exceeded"


def no_folder(monkeypatch, folder):
    folder.write_text("")
    return "Not a directory"


@pytest.mark.parametrize("harm", [full_from_the_start, full_when_the_file_is_made, full_at_the_end, no_folder])
def test_features_that_cannot_be_cached_are_measured_and_it_is_said_once(photos, tmp_path, monkeypatch, capsys, harm):
    models = [tiny_model(CPU, seed)[0].target_encoder for seed in (0, 1)]
    fresh = read_features(models, opened(photos), "pooled")
    why = harm(monkeypatch, tmp_path / "cache")
    split, cache = opened(photos), FeatureCache(tmp_path / "cache" / "deep")
    found = read_features(models, split, "pooled", cache=cache)
    assert split.reads == 1
    for mine, other in zip(found, fresh, strict=True):
        np.testing.assert_array_equal(mine.values, other.values)
        np.testing.assert_array_equal(mine.labels, other.labels)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.fullmatch(rf"{cache.root}: features are not cached \({why}\); .*", said[0])
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_features_that_fit_neither_disk_nor_memory_are_refused_before_the_work(photos, tmp_path, monkeypatch):
    model, _ = tiny_model(CPU)
    full_from_the_start(monkeypatch, tmp_path)
    monkeypatch.setattr(cache_module, "_memory_available", lambda: 10)
    split = opened(photos)
    with pytest.raises(UserError, match=r"0\.0 MB are free; give a larger --cache-limit, another --cache"):
        read_features([model.encoder], split, "pooled", cache=FeatureCache(tmp_path / "cache"))
    assert split.reads == 0


def test_tokens_are_announced_in_one_line_with_what_lies_there_and_not_again(photos, tmp_path, capsys):
    """8 training and 2 test images, two encoders; a label of a row is 8 bytes."""
    models = [tiny_model(CPU, seed)[0].target_encoder for seed in (0, 1)]
    cache, splits = FeatureCache(tmp_path / "cache"), open_splits(photos, CPU)
    (cache.root / "old").mkdir(parents=True)
    (cache.root / "old" / "values.npy").write_bytes(bytes(5_000_000))
    announce(models, splits, "tokens", cache)
    rows = 2 * (len(splits[0]) + len(splits[1]))
    size = rows * (models[0].patches * models[0].width * 2 + 8) / 1e6
    line = f"{size:.1f} MB of tokens in half precision are cached here beside 5.0 MB; --cache-limit: 8.0 GB"
    assert capsys.readouterr().err == f"{cache.root}: {line}\n"
    for split in splits:
        read_features(models, split, "tokens", cache=cache)
    announce(models, splits, "tokens", cache)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("announced", [True, False])
def test_what_would_exceed_the_limit_of_the_folder_stays_in_memory(photos, tmp_path, capsys, announced):
    """Two encoders' tokens: room for one and a half. Announced, neither is written; unannounced, the first."""
    models = [tiny_model(CPU, seed)[0].target_encoder for seed in (0, 1)]
    split = opened(photos)
    fresh = read_features(models, split, "tokens")
    cache = FeatureCache(tmp_path / "cache", 1.5 * fresh[0].values.nbytes / 1e9)
    if announced:
        announce(models, [split], "tokens", cache)
    found = read_features(models, split, "tokens", cache=cache)
    for mine, other in zip(found, fresh, strict=True):
        np.testing.assert_array_equal(mine.values, other.values)
    assert [isinstance(one.values, np.memmap) for one in found] == [not announced, False]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"features are not cached \(they need \S+ MB.*, --cache-limit is 0\.0 MB\); they are in memory", line
    )


def test_a_file_that_cannot_be_decoded_is_left_out(photos, tmp_path):
    model, _ = tiny_model(CPU)
    split = opened(photos, LENIENT)
    Path(split.files.name(2)).write_bytes(b"broken")
    found = read_features([model.encoder], split, "pooled", cache=FeatureCache(tmp_path / "cache"))[0]
    assert len(found) == len(found.labels) == len(split) - 1
    np.testing.assert_array_equal(found.labels, np.delete(split.files.labels, 2))


def test_an_entry_remembers_what_was_left_out(photos, tmp_path):
    """An entry from the cache repeats it, and is refused if the limit is lower by now."""
    model, _ = tiny_model(CPU)
    cache, split = FeatureCache(tmp_path / "cache"), opened(photos, LENIENT)
    broken = split.files.name(2)
    Path(broken).write_bytes(b"broken")
    read_features([model.encoder], split, "pooled", cache=cache)
    again = opened(photos, LENIENT)
    read_features([model.encoder], again, "pooled", cache=cache)
    assert again.reads == 0
    assert again.bad == split.bad == {broken: "cannot identify image file"}
    with pytest.raises(UserError, match="1 of 8 images cannot be used"):
        read_features([model.encoder], opened(photos), "pooled", cache=cache)


def test_an_entry_that_does_not_say_what_was_left_out_is_computed_anew(photos, tmp_path):
    """As written by earlier versions."""
    model, _ = tiny_model(CPU)
    cache = FeatureCache(tmp_path / "cache")
    read_features([model.encoder], opened(photos), "pooled", cache=cache)
    (path,) = (tmp_path / "cache").glob("*/entry.json")
    path.write_text(json.dumps({"count": json.loads(path.read_text())["count"]}))
    split = opened(photos)
    read_features([model.encoder], split, "pooled", cache=cache)
    assert split.reads == 1
    assert json.loads(path.read_text())["left_out"] == {}


def test_a_file_that_became_readable_is_read_again(photos, tmp_path):
    """chmod changes the change time, though neither size nor content."""
    model, _ = tiny_model(CPU)
    cache, split = FeatureCache(tmp_path / "cache"), opened(photos)
    path = Path(split.files.name(1))
    path.chmod(0o600)
    first = split.fingerprint()
    path.chmod(0o644)
    assert opened(photos).fingerprint() != first
    assert len(read_features([model.encoder], opened(photos), "pooled", cache=cache)[0]) == 8
