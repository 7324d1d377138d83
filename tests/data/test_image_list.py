from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from iwm_fast.data.image_list import list_images, split
from iwm_fast.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(images, root):
    return [str(Path(images.name(i)).relative_to(root)) for i in range(len(images))]


def test_images_are_sorted_by_their_path_below_the_root(tmp_path):
    touch(tmp_path, "b/2.png", "b/10.JPG", "a/x/z.webp", "a/1.jpeg", "a/notes.txt", "b/._1.jpg", ".cache/1.jpg")
    images = list_images(tmp_path)
    assert names(images, tmp_path) == ["a/1.jpeg", "a/x/z.webp", "b/10.JPG", "b/2.png"]


def test_the_first_folder_is_the_class(tmp_path):
    touch(tmp_path, "dog/1.jpg", "cat/1.jpg", "cat/more/2.jpg")
    images = list_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1]
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize(
    "found", [["1.jpg", "2.jpg"], ["all/1.jpg", "all/2.jpg"], ["1.jpg", "cat/2.jpg"]], ids=["flat", "one", "mixed"]
)
def test_without_a_folder_for_each_class_there_are_no_labels(tmp_path, found):
    touch(tmp_path, *found)
    images = list_images(tmp_path)
    assert len(images) == 2
    assert images.labels is None
    assert images.classes == ()


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "store/1.jpg", "root/cat/1.jpg")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "root")
    assert list_images(tmp_path / "root").classes == ("cat", "dog")


def test_folders_without_images_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "missing")
    with pytest.raises(UserError, match="is empty"):
        list_images(tmp_path)
    touch(tmp_path, "a.txt", "b/c.txt")
    with pytest.raises(UserError, match=r"2 files \(2 \.txt\), none of them an image") as caught:
        list_images(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "a.txt")


def test_split_takes_train_and_test_with_common_labels(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/c/2.jpg", "test/a/3.jpg", "test/b/4.jpg", "test/c/5.jpg")
    train, test = split(tmp_path)
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 2]
    assert test.labels.tolist() == [0, 1, 2]


def test_split_without_folders_is_80_to_20_and_always_the_same(tmp_path):
    touch(tmp_path, *(f"{n % 2}/{n:03d}.jpg" for n in range(50)))
    train, test = split(tmp_path)
    assert (len(train), len(test)) == (40, 10)
    assert not set(names(train, tmp_path)) & set(names(test, tmp_path))
    assert names(split(tmp_path)[1], tmp_path) == names(test, tmp_path)
    for images in (train, test):
        folders = [name.split("/")[0] for name in names(images, tmp_path)]
        assert folders == [images.classes[label] for label in images.labels]


def test_split_needs_two_images(tmp_path):
    touch(tmp_path, "1.jpg")
    with pytest.raises(UserError, match="one image only"):
        split(tmp_path)
