from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import pictures, tiny_config

from iwm_fast.config import Config, DataConfig
from iwm_fast.errors import UserError
from iwm_fast.eval.splits import TensorSplit, open_splits

CPU = Config(**(dict(tiny_config()) | {"data": DataConfig(device="cpu", threads=1)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and light, as PNGs of the model's own size: what is decoded is known to the last level."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count, seed in (("train", 30, 0), ("test", 10, 1)):
        for label, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(pictures(count, seed + 10 * label) // 2 + 90 * label):
                Image.fromarray(image.numpy()).save(root / part / name / f"{i:03d}.png")
    return root


def test_images_and_labels_come_in_the_order_of_the_files(folder):
    train, test = open_splits(folder, CPU)
    images, labels = (list(parts) for parts in zip(*test.read(), strict=True))
    assert torch.equal(torch.cat(images).cpu(), torch.cat([pictures(10, 1) // 2, pictures(10, 11) // 2 + 90]))
    assert np.concatenate(labels).tolist() == [0] * 10 + [1] * 10
    assert (len(train), len(test), train.classes) == (60, 20, ("dark", "light"))
    again, _ = zip(*test.read(), strict=True)
    assert torch.equal(torch.cat(again), torch.cat(images))


def test_a_limit_and_a_sample_are_spread_over_the_classes(folder):
    train, test = open_splits(folder, CPU, limit=7)
    assert (len(train), len(test)) == (7, 7)
    assert {int(label) for _, labels in train.read() for label in labels} == {0, 1}
    assert (test.spread(4).float().mean(dim=(1, 2, 3)) > 100).tolist() == [False, False, True, True]
    memory = TensorSplit(pictures(9))
    assert torch.equal(memory.spread(3), pictures(9)[[1, 4, 7]])
    assert memory.classes == ()
    with pytest.raises(ValueError, match="labels has 3 entries"):
        TensorSplit(pictures(9), np.zeros(3, np.int64))


def test_files_that_cannot_be_decoded_are_left_out_with_their_labels(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pictures(1)[0].numpy()).save(tmp_path / "test" / name / "good.png")
        (tmp_path / "test" / name / "bad.png").write_bytes(b"not a picture")
        (tmp_path / "train" / name / "bad.png").write_bytes(b"not a picture")
    train, test = open_splits(tmp_path, CPU)
    found = list(test.read())
    assert [len(images) for images, _ in found] == [2]
    assert found[0][1].tolist() == [0, 1]
    assert sorted(Path(name).parent.name for name in test.bad) == ["a", "b"]
    assert test.spread(4).shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="none of the 2 images"):
        list(train.read())
