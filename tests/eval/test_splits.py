from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import pictures, tiny_config

from iwm_fast.config import Config, DataConfig
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError
from iwm_fast.eval.splits import TensorSplit, open_splits, require_same_classes, splits_record
from iwm_fast.eval.unusable import left_out_lines

CPU = Config(**(dict(tiny_config()) | {"data": DataConfig(device="cpu", threads=1)}))
LENIENT = Config(**(dict(CPU) | {"data": DataConfig(device="cpu", threads=1, max_bad_fraction=1.0)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and light, as PNGs of the model's own size: decoded levels are known exactly."""
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
    train, test = open_splits(tmp_path, LENIENT)
    found = list(test.read())
    assert [len(images) for images, _ in found] == [2]
    assert found[0][1].tolist() == [0, 1]
    assert sorted(Path(name).parent.name for name in test.bad) == ["a", "b"]
    assert test.spread(4).shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="none of the 2 images"):
        list(train.read())


def torn(folder, tmp_path, *names):
    """Return a copy of ``folder`` in which these files hold no picture."""
    root = tmp_path / "torn"
    shutil.copytree(folder, root)
    for name in names:
        (root / name).write_bytes(b"torn")
    return root


def test_more_bad_images_than_the_limit_are_refused_and_the_first_ten_named(folder, tmp_path):
    names = [f"train/light/{i:03d}.png" for i in range(11)]
    root = torn(folder, tmp_path, *names, "test/dark/000.png")
    allowed = Config(**(dict(CPU) | {"data": DataConfig(device="cpu", threads=1, max_bad_fraction=0.05)}))
    train, test = open_splits(root, allowed)
    with pytest.raises(UserError, match=r"torn/train: 11 of 60 images cannot be used") as refused:
        list(train.read())
    message = str(refused.value)
    assert "more than data.max_bad_fraction (0.05) allows" in message
    assert all(f"{root}/{name} (cannot identify image file)" in message for name in names[:10])
    assert names[10] not in message
    assert "; and 1 more." in message
    assert sum(len(images) for images, _ in test.read()) == 19  # 1 of 20 is not above the limit
    assert test.left_out.record()["files"] == [
        {"file": f"{root}/test/dark/000.png", "reason": "cannot identify image file"}
    ]


def test_a_class_of_which_no_image_can_be_decoded_is_refused(folder, tmp_path):
    root = torn(folder, tmp_path, *(f"test/dark/{i:03d}.png" for i in range(10)))
    _, test = open_splits(root, LENIENT)
    with pytest.raises(UserError, match=r"torn/test: none of the 10 images of class dark can be used: .*000\.png \("):
        list(test.read())
    assert test.spread(4).shape[0] == 2  # the others are readable


def test_a_part_of_a_split_counts_for_the_whole_and_a_thinned_one_by_itself(folder, tmp_path):
    root = torn(folder, tmp_path, "train/dark/000.png")
    train, _ = open_splits(root, Config(**(dict(CPU) | {"data": DataConfig(device="cpu", max_bad_fraction=0.02)})))
    part = train.take(np.arange(4))
    assert sum(len(images) for images, _ in part.read()) == 3
    assert len(train.left_out) == 1
    alone = train.take(np.array([0]))
    assert list(alone.read()) == []  # another part may have images of its class
    thin = train.thinned(30)  # every second file, without the bad one
    assert (len(thin), len(thin.left_out), thin.left_out.total) == (30, 0, 30)


def test_numbers_of_a_sample_do_not_move_where_an_image_is_left_out(folder, tmp_path):
    _, test = open_splits(torn(folder, tmp_path, "test/dark/007.png"), LENIENT)
    images, numbers = test.numbered_spread(4)  # 2, 7, 12 and 17 of 20
    assert numbers == [0, 2, 3]
    assert len(images) == 3


def test_the_layout_is_recorded_with_what_was_left_out(folder, tmp_path):
    root = torn(folder, tmp_path, "train/dark/003.png")
    (root / "test").rename(root / "Val")
    train, test = open_splits(root, LENIENT)
    list(train.read())
    record = splits_record(train, test)
    assert (record["splits"]["train"], record["splits"]["test"]) == (f"{root}/train", f"{root}/Val")
    assert record["left_out"]["train"]["count"] == 1
    assert record["left_out"]["test"] == {"count": 0, "of": 20, "files": [], "unlabelled": 0}
    (line,) = left_out_lines(record["left_out"])
    assert line == f"train: 1 of 60 images left out: {root}/train/dark/003.png (cannot identify image file)"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u2028b", "a\x7fb"])
def test_names_of_classes_and_files_are_printed_on_one_line(folder, tmp_path, name):
    root = torn(folder, tmp_path)
    (root / "train" / "dark").rename(root / "train" / name)
    with pytest.raises(UserError) as refused:
        require_same_classes(*open_splits(root, LENIENT))
    assert str(refused.value).isprintable()
    (root / "test" / "dark").rename(root / "test" / name)
    for path in (root / "test" / name).iterdir():
        path.write_bytes(b"torn")
    _, test = open_splits(root, LENIENT)
    with pytest.raises(UserError, match="none of the 10 images of class a") as refused:
        list(test.read())
    assert str(refused.value).isprintable()
    assert left_out_lines({"test": test.left_out.record()})[0].isprintable()


def test_images_beside_the_folders_of_classes_are_refused_and_records_without_a_label_counted(folder, tmp_path):
    root = torn(folder, tmp_path)
    shutil.copy(root / "train" / "dark" / "000.png", root / "train")
    train, test = open_splits(root, CPU)
    assert (len(train), train.left_out.record()["unlabelled"]) == (60, 1)
    with pytest.raises(UserError, match="torn/train: 1 images are beside the class folders"):
        require_same_classes(train, test)
    packed = tmp_path / "packed"
    write_shards(root / "train", packed / "train")
    write_shards(root / "test", packed / "test")
    train, test = open_splits(packed, CPU)
    require_same_classes(train, test)
    record = splits_record(train, test)["left_out"]
    assert (record["train"]["of"], record["train"]["unlabelled"], record["test"]["unlabelled"]) == (60, 1, 0)
    assert left_out_lines(record) == ["train: 1 images without a label left out"]
