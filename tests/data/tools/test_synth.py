from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from iwm_fast.data.image_list import split
from iwm_fast.data.tools.synth import CLASSES, draw_dataset, draw_images
from iwm_fast.errors import UserError


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_labelled_set_is_generated(tmp_path):
    draw_dataset(tmp_path / "set", classes=5, train=40, test=11, size=32)
    train, test = split(tmp_path / "set")
    assert train.classes == test.classes == tuple(sorted(CLASSES[:5]))
    assert np.bincount(train.labels).tolist() == [8] * 5
    assert len(test) == 11
    image = Image.open(train.name(0))
    assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")


def test_the_same_seed_generates_the_same_set_and_another_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_dataset(tmp_path / name, train=16, test=8, size=16, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["train/disc_smooth/00000.jpg"] != c["train/disc_smooth/00000.jpg"]
    assert a["train/disc_smooth/00000.jpg"] != a["test/disc_smooth/00000.jpg"]


def test_a_set_that_is_there_already_is_kept_and_anything_else_is_not_touched(tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    draw_dataset(out, train=8, test=8, size=16)  # an empty folder is taken
    before = (out / "synth.json").stat().st_mtime_ns
    draw_dataset(out, train=8, test=8, size=16)
    assert (out / "synth.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other files already"):
        draw_dataset(out, train=9, test=8, size=16)
    assert json.loads((out / "synth.json").read_text())["train"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_nothing_is_left_where_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        draw_dataset(tmp_path / "file", train=8, test=8, size=16)
    with pytest.raises(UserError, match="cannot be written"):
        draw_dataset(tmp_path / "file" / "below", train=8, test=8, size=16)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_numbers_out_of_range_are_refused(tmp_path):
    for wrong in ({"classes": 1}, {"classes": 9}, {"train": 0}, {"size": 8}):
        with pytest.raises(ValueError, match="must be"):
            draw_dataset(tmp_path / "set", **wrong)


def test_neither_mean_colour_nor_brightness_tells_the_class():
    """Nearest neighbours in mean colour do no better than chance, 1 in 8: within four standard errors of 512 images."""
    labels = np.arange(1024) % 8
    colour = draw_images(labels, 32, np.random.default_rng(0)).mean(axis=(1, 2))
    known, asked = colour[:512], colour[512:]
    distance = ((asked[:, None] - known[None]) ** 2).sum(axis=2)
    nearest = labels[:512][np.argsort(distance, axis=1)[:, :15]]
    votes = np.stack([(nearest == label).sum(axis=1) for label in range(8)], axis=1)
    accuracy = (votes.argmax(axis=1) == labels[512:]).mean()
    assert accuracy < 1 / 8 + 4 * np.sqrt(1 / 8 * 7 / 8 / 512)


def test_pictures_are_colourful():
    images = draw_images(np.arange(64) % 8, 32, np.random.default_rng(0)).astype(float)
    saturation = images.max(axis=3) - images.min(axis=3)
    assert saturation.mean() > 50
    assert images.std(axis=(1, 2)).mean() > 20
