"""Which folders, shards and manifests are a split, and what is refused rather than guessed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_images import encode, picture

from iwm_fast.data.image_list import divide
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.split_layout import find_layout, splits_of_shards, tell_of_shard_splits, tell_of_splits
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError

RAW = encode(picture(9, 7), "PNG")


def make(root: Path, *folders: str, count: int = 2) -> Path:
    """Write images below each of the folders."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").write_bytes(RAW)
    return root


def classes_of(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("TRAIN", "train"),
        ("train2017", "train"),
        ("training_set", "train"),
        ("test", "test"),
        ("test-data", "test"),
        ("val", "val"),
        ("Valid", "val"),
        ("validation", "val"),
        ("dev", "val"),
        ("trainer", None),
        ("value", None),
        ("latest", None),
        ("test 12", None),
        ("", None),
    ],
)
def test_names_of_splits(name, kind):
    assert split_kind(name) == kind


@pytest.mark.parametrize(
    ("folders", "train", "test", "unused"),
    [
        (classes_of("train", "test"), "train", "test", []),
        (classes_of("train", "val"), "train", "val", []),
        (classes_of("Train", "VALIDATION"), "Train", "VALIDATION", []),
        (classes_of("training", "dev"), "training", "dev", []),
        (classes_of("train", "val", "test"), "train", "test", ["val"]),
        ([*classes_of("train", "test"), "more"], "train", "test", ["more"]),
    ],
    ids=lambda value: "+".join(dict.fromkeys(f.split("/")[0] for f in value)) if isinstance(value, list) else None,
)
def test_the_usual_layouts_are_recognised_and_said(tmp_path, folders, train, test, unused):
    learned, tested, layout = divide(make(tmp_path, *folders))
    assert (layout.train, layout.test) == (f"{tmp_path}/{train}", f"{tmp_path}/{test}")
    assert list(layout.unused) == [f"{tmp_path}/{name}" for name in unused]
    assert learned.classes == tested.classes == ("cat", "dog")
    assert (len(learned), len(tested)) == (4, 4)
    for place in (layout.train, layout.test, *layout.unused):
        assert place in layout.line()
    assert layout.record()["said"] == layout.line()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (classes_of("train", "val", "validation"), "holds val/ and validation/, all of them names of a val split"),
        (classes_of("train", "Train", "test"), "holds Train/ and train/, all of them"),
        (classes_of("train"), r"holds train/ and no test/ or val/: add it, or give .*/train"),
        (classes_of("val"), "holds val/ and no train/"),
        (classes_of("test", "val"), "holds test/ and val/ and no train/"),
        (["cat", "dog", "train/cat"], r"holds train/, a split by its name, among 2 other folders \(cat/ and dog/\)"),
        (["cat", "test"], "holds test/, a split by its name, among 1 other folders"),
        (classes_of("set/train", "set/val"), r"nothing else, which holds train/ and test/ \(or val/\): give .*/set"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "holds train/ and test/ .* below a class"),
    ],
    ids=["two for testing", "two for learning", "train alone", "val alone", "no train", "among classes", "test among",
         "one folder down", "below classes"],
)  # fmt: skip
def test_what_is_ambiguous_is_refused(tmp_path, folders, words):
    with pytest.raises(UserError, match=words) as refused:
        divide(make(tmp_path, *folders))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "folders",
    [
        ["seg_test", "seg_train"],
        ["ILSVRC2012_img_train", "ILSVRC2012_img_val"],
        ["testA", "testB", "trainA", "trainB"],
        ["TestImages_v2", "TrainImages_v1"],
        ["more", "train_small", "val_small"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("pack", [None, write_index, write_shards], ids=["folder", "manifest", "shards"])
def test_folders_that_only_the_word_of_a_split_tells_apart_are_no_classes(tmp_path, folders, pack):
    root = make(tmp_path / "set", *folders)
    if pack is not None:
        root = tmp_path / ("all.tsv" if pack is write_index else "packed")
        pack(tmp_path / "set", root)
    with pytest.raises(UserError, match="which look like splits and would be taken for classes; rename them"):
        divide(root)


def test_classes_with_the_word_of_a_split_are_classes_where_more_tells_them_apart(tmp_path):
    learned, _, layout = divide(make(tmp_path, "bullet_train", "freight_train", "test_tube"))
    assert layout.how == "sample ids"
    assert learned.classes == ("bullet_train", "freight_train", "test_tube")


def test_a_split_that_is_a_link_to_the_other_is_said(tmp_path):
    make(tmp_path, *classes_of("train"))
    (tmp_path / "val").symlink_to("train")
    layout = find_layout(tmp_path)
    assert layout.line() == (
        f"train on {tmp_path}/train, test on {tmp_path}/val; they are one folder, by a link: every test image is a "
        "training image"
    )
    make(tmp_path / "other", *classes_of("train", "val"))
    assert "; " not in find_layout(tmp_path / "other").line()


@pytest.mark.parametrize("inner", ["train", "val", "test", "Dev"])
def test_a_class_below_a_split_may_have_any_name(tmp_path, inner):
    make(tmp_path, "train/cat", f"train/{inner}", "test/cat", f"test/{inner}")
    learned, _, layout = divide(tmp_path)
    assert layout.how == "folders"
    assert set(learned.classes) == {"cat", inner}


def test_folders_without_images_and_hidden_ones_say_nothing(tmp_path):
    make(tmp_path, "cat", "dog")
    assert find_layout(tmp_path).how == "sample ids"
    make(tmp_path / "set", *classes_of("train", "val"))
    (tmp_path / "set" / "annotations").mkdir()
    (tmp_path / "set" / "annotations" / "all.json").write_text("{}")
    make(tmp_path / "set", ".test/cat")
    (tmp_path / "set" / "loop").symlink_to("..")
    (tmp_path / "set" / "readme.png").write_bytes(RAW)
    layout = find_layout(f"{tmp_path}/set/")
    assert layout.test == f"{tmp_path}/set/val"
    assert layout.unused == (f"{tmp_path}/set/loop", f"the files directly in {tmp_path}/set")


def test_shards_and_manifests_lie_in_splits_too(tmp_path):
    make(tmp_path / "set", *classes_of("train", "val"), count=3)
    for part, name in (("train", "Train"), ("val", "valid")):
        write_shards(tmp_path / "set" / part, tmp_path / "packed" / name)
        (tmp_path / "indexed" / part).mkdir(parents=True)
        write_index(tmp_path / "set" / part, tmp_path / "indexed" / part / "iwm-fast-manifest.tsv")
    for root, test in (("packed", "valid"), ("indexed", "val")):
        learned, tested, layout = divide(tmp_path / root)
        assert layout.test == f"{tmp_path}/{root}/{test}"
        assert learned.classes == tested.classes == ("cat", "dog")
        assert (len(learned), len(tested)) == (6, 6)


def test_shards_of_one_folder_are_divided_by_their_names(tmp_path):
    make(tmp_path / "set", *classes_of("train", "val"), count=3)
    (tmp_path / "flat").mkdir()
    for part in ("train", "val"):
        write_shards(tmp_path / "set" / part, tmp_path / part)
        shutil.copy(next((tmp_path / part).glob("*.tar")), tmp_path / "flat" / f"set-{part}-000.tar")
        shutil.copy(tmp_path / part / "classes.txt", tmp_path / "flat")
    learned, tested, layout = divide(tmp_path / "flat")
    assert layout.how == "shard names"
    assert layout.test.endswith("set-val-000.tar")
    assert {learned.name(row).split(".tar:")[0][-9:] for row in range(len(learned))} == {"train-000"}
    assert (len(learned), len(tested), tested.classes) == (6, 6, ("cat", "dog"))
    for path in (tmp_path / "flat").glob("*.tar"):
        path.rename(path.with_suffix(".TAR"))
    learned, tested, layout = divide(tmp_path / "flat")
    assert (layout.how, len(learned), len(tested)) == ("shard names", 6, 6)
    assert layout.test.endswith("set-val-000.TAR")


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (["train-00000-of-00002", "validation-00000-of-00001"], ["train", "test"]),
        (["a/in-train-0.tar", "a/in-val-0.tar", "a/in-test-0.tar"], ["train", "unused", "test"]),
        (["train-0.tar", "train-1.tar"], None),
        (["shard-0.tar", "shard-1.tar"], None),
        (["val-0.tar", "test-0.tar"], None),
        (["trainset-0.tar", "testset_0.tar"], ["train", "test"]),
        (["train2017.tar", "cocoVal2017.tar"], ["train", "test"]),
    ],
)
def test_names_of_shards_say_all_or_nothing(files, kinds):
    found = splits_of_shards(files)
    assert (None if found is None else [found[file] for file in files]) == kinds


def test_a_shard_whose_name_says_nothing_among_others_is_refused():
    with pytest.raises(UserError, match=r"more-0\.tar: neither train, test nor val stands in its name"):
        splits_of_shards(["train-0.tar", "val-0.tar", "more-0.tar"])


@pytest.mark.parametrize("pack", [write_index, write_shards], ids=["manifest", "shards"])
def test_splits_that_were_packed_as_classes_are_said_and_refused(tmp_path, pack, capfd):
    make(tmp_path / "set", *classes_of("train", "val"))
    out = tmp_path / ("all.tsv" if pack is write_index else "packed")
    pack(tmp_path / "set", out)
    assert f"{tmp_path}/set holds train/ and val/, the names of splits: they are" in capfd.readouterr().err
    with pytest.raises(UserError, match="its classes are train/ and val/, which are names of splits"):
        divide(out)


@pytest.mark.parametrize(("folders", "told"), [(classes_of("train", "val"), True), (["cat", "train"], False)])
def test_a_folder_of_which_all_is_taken_is_told_of_its_splits(tmp_path, folders, told, capfd):
    tell_of_splits(make(tmp_path, *folders), "all of them are trained on")
    line = (
        f"{tmp_path} holds train/ and val/, the names of splits: all of them are trained on; name one of them alone\n"
    )
    assert capfd.readouterr().err == (line if told else "")


@pytest.mark.parametrize(
    ("files", "told"),
    [(["train-0.tar", "val-0.TAR"], True), (["train-0.tar", "train-1.tar"], False), (["train-0", "val-0", "x"], False)],
)
def test_shards_of_several_splits_of_which_all_are_taken_are_told(files, told, capfd):
    tell_of_shard_splits("/packed", files, "all of them are trained on")
    said = capfd.readouterr().err
    assert said.startswith("/packed holds train-0") if told else said == ""
    assert ("train-0 and val-0, files of several splits: all of them are trained on" in said) is told


@pytest.mark.parametrize(
    ("folders", "images"),
    [
        (["JPEGImages", "SegmentationClass", "SegmentationObject"], "JPEGImages"),
        (["annotations/trimaps", "images"], "images"),
        (["img", "ground_truth"], "img"),
    ],
)
def test_folders_of_what_is_drawn_upon_images_are_no_class(tmp_path, folders, images):
    with pytest.raises(UserError, match=rf"a set for .*segmentation .*give {tmp_path}/{images} for its images alone"):
        divide(make(tmp_path, *folders))


@pytest.mark.parametrize("parts", [(".",), ("train", "val")], ids=["whole", "in splits"])
def test_masks_are_no_class(tmp_path, parts):
    make(tmp_path, *(f"{part}/{kind}" for part in parts for kind in ("images", "masks")))
    with pytest.raises(UserError, match=r"holds images/ and masks/, a set for .*segmentation.*/images for its images"):
        divide(tmp_path)


def test_a_link_to_itself_hides_no_folder(tmp_path):
    make(tmp_path, *classes_of("train", "test"))
    write_index(tmp_path / "train")
    for folder in (tmp_path, tmp_path / "train"):
        (folder / "loop").symlink_to("loop")
    learned, tested, layout = divide(tmp_path)
    assert layout.train.endswith("/train")
    assert len(learned) == len(tested) == 4
