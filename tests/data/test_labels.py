"""An image without a label loses only its own label, whatever kind of source it is in."""

from __future__ import annotations

import os

import pytest
from made_images import encode, picture
from made_sources import example, write_classes, write_records, write_tar

from iwm_fast.data import image_list
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images, split
from iwm_fast.data.sources.example import message_class
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError

IMAGE = encode(picture(20, 20))
EXPECTED = ["cat", None, "dog", "cat", "dog", "cat"]


def records(root):
    root.mkdir()
    labels = {"cat": 3, "dog": 12, None: None}
    write_records(root / "a.tfrecord", [example(IMAGE, labels[name]) for name in EXPECTED])


def shards(root, kind="cls", text="{}"):
    members = []
    for number, name in enumerate(EXPECTED):
        members.append((f"{number}.jpg", IMAGE))
        if name is not None:
            members.append((f"{number}.{kind}", text.replace("{}", name).encode()))
    write_tar(root / "a.tar", members)


def folder(root):
    for number, name in enumerate(EXPECTED):
        path = root / (name or "") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)


def manifest(root):
    folder(root)
    write_index(root)


def old_manifest(root):
    """Without the classes in its first line."""
    manifest(root)
    path = root / "iwm-fast-manifest.tsv"
    first, rest = path.read_text().split("\n", 1)
    path.write_text("\t".join(field for field in first.split("\t") if not field.startswith("classes=")) + "\n" + rest)


def own_shards(root):
    folder(root.parent / "folder")
    write_shards(root.parent / "folder", root)


MAKE = {
    "tfrecord": records,
    "cls": shards,
    "json": lambda root: shards(root, "json", '{"label": "{}"}'),
    "an empty cls": lambda root: write_tar(
        root / "a.tar",
        [m for n, name in enumerate(EXPECTED) for m in ((f"{n}.jpg", IMAGE), (f"{n}.cls", (name or " \n").encode()))],
    ),
    "folder": folder,
    "manifest": manifest,
    "manifest of shards": lambda root: (shards(root), write_index(root)),
    "old manifest": old_manifest,
    "our shards": own_shards,
}


@pytest.mark.parametrize("what", MAKE)
def test_an_image_without_a_label_costs_no_other_its_label(what, tmp_path):
    root = tmp_path / "data"
    MAKE[what](root)
    images = list_images(root)
    assert len(images) == 6
    assert len(images.classes) == 2
    names = {"3": "cat", "12": "dog"}
    found = sorted(
        str(None if label < 0 else names.get(images.classes[label], images.classes[label])) for label in images.labels
    )
    assert found == sorted(map(str, EXPECTED))
    assert (images.labels == -1).sum() == 1


@pytest.mark.parametrize("what", MAKE)
def test_evaluation_leaves_it_out_and_says_so(what, tmp_path, capfd):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        MAKE[what](tmp_path / part / "x" if what == "our shards" else tmp_path / part / "data")
        if what == "our shards":
            (tmp_path / part / "folder").rename(tmp_path / f"folder of {part}")
        for path in (tmp_path / part / ("x" if what == "our shards" else "data")).iterdir():
            path.rename(tmp_path / part / path.name)
    for images in split(tmp_path):
        assert len(images) == 5
        assert images.labels.min() == 0
    said = capfd.readouterr().err
    assert said.count("left out: 1 of 6 images, which have no label") == 2


def test_a_part_with_no_label_at_all_beside_labels_is_an_error(tmp_path):
    labels = [None if tested else number % 2 for number, tested in enumerate(image_list.test_rows(20))]
    (tmp_path / "data").mkdir()
    write_records(tmp_path / "data" / "a.tfrecord", [example(IMAGE, label) for label in labels])
    with pytest.raises(UserError, match=r"of the images to test on none has a label .*tfrecord:\d+\)"):
        split(tmp_path / "data")


def test_what_has_no_label_is_said_once_for_both_parts(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    offsets = write_records(tmp_path / "data" / "a.tfrecord", [example(IMAGE, n % 3 or None) for n in range(20)])
    learn, test = split(tmp_path / "data")
    assert len(learn) + len(test) == 13
    split(tmp_path / "data")
    names = ", ".join(f"a.tfrecord:{offset}" for offset in offsets[:9:3])
    assert capfd.readouterr().err == (f"{tmp_path}/data: left out: 7 of 20 images, which have no label ({names}, …)\n")


def test_files_beside_more_of_them_in_folders_are_unlabelled_and_fewer_make_no_classes(tmp_path):
    for name in ("1.jpg", "a/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(IMAGE)
    assert list_images(tmp_path).labels.tolist() == [-1, 0, 1]
    for number in range(4):
        (tmp_path / f"0{number}.jpg").write_bytes(IMAGE)
    assert list_images(tmp_path).labels is None


ODD = [
    "0",
    "1",
    "10",
    "2",
    "01",
    "a b",
    "new\nline",
    "back\\slash",
    "tab\t",
    "\u2028",
    "ü",
    os.fsdecode(b"latin\xe9"),
    "cr\r",
    "\\n",
]


def test_classes_have_the_same_names_and_order_in_folder_manifest_and_shards(tmp_path):
    write_classes(tmp_path / "a", 2 * len(ODD), ODD)
    write_shards(tmp_path / "a", tmp_path / "shards")
    plain = list_images(tmp_path / "a")
    write_index(tmp_path / "a", tmp_path / "a.tsv")
    write_index(tmp_path / "shards", tmp_path / "shards.tsv")
    for packed in (tmp_path / "a.tsv", tmp_path / "shards", tmp_path / "shards.tsv"):
        images = list_images(packed)
        assert images.classes == plain.classes == tuple(sorted(ODD))
        assert images.labels.tolist() == plain.labels.tolist()
        assert [images.read(i) for i in range(len(images))] == [plain.read(i) for i in range(len(plain))]


def test_classes_without_an_image_stay_in_a_manifest_of_shards(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", IMAGE), ("1.cls", b"2"), ("2.jpg", IMAGE), ("2.cls", b"0")])
    (tmp_path / "classes.txt").write_text("zebra\nape\ncow\n")
    before = list_images(tmp_path)
    write_index(tmp_path)
    after = list_images(tmp_path)
    assert after.classes == before.classes == ("zebra", "ape", "cow")
    assert after.labels.tolist() == before.labels.tolist() == [2, 0]
    path = tmp_path / "iwm-fast-manifest.tsv"
    path.write_text(path.read_text().replace("\tcow\t", "\tpig\t"))
    with pytest.raises(UserError, match=r"a\.tar:1\.jpg has the label pig, which is not a class"):
        _ = list_images(tmp_path).labels


def of_folder(top, classes=("cat", "dog")):
    """Return members as in a tar of the folder `top`."""
    return [(f"{top}/{name}/{number}.jpg", IMAGE) for name in classes for number in range(2)]


@pytest.mark.parametrize("top", ["train", "./train", "pets", "pets/train", "/abs/pets"])
def test_a_tar_of_a_folder_has_the_classes_of_that_folder(tmp_path, top):
    write_tar(tmp_path / "a.tar", [*of_folder(top), (f"{top}/contact-sheet.jpg", IMAGE)])
    images = list_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 1, 1, -1]


def test_tars_of_two_splits_beside_each_other_have_the_same_classes(tmp_path):
    for part in ("train", "val"):
        write_tar(tmp_path / f"{part}.tar", of_folder(f"set/{part}"))
    for images in split(tmp_path):
        assert images.classes == ("cat", "dog")
        assert images.labels.tolist() == [0, 0, 1, 1]


def test_a_tar_of_two_splits_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", of_folder("set/train") + of_folder("set/val"))
    with pytest.raises(UserError, match="its classes are train/ and val/, which are names of splits"):
        split(tmp_path)


def test_a_tar_per_class_keeps_its_folder_as_the_class(tmp_path):
    for name in ("cat", "dog"):
        write_tar(tmp_path / f"{name}.tar", of_folder(name, ("young", "old")))
    assert list_images(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("cls", ["0", "07", "7.0\n", "\ufeff00"]),
        ("json", ['{"label": 0}', '{"label": 7.0}', '{"label": "7"}', '{"label": [0]}']),
    ],
)
def test_one_number_is_one_class_however_it_is_written(tmp_path, kind, texts):
    members = [
        (f"{n}.{end}", data) for n, text in enumerate(texts) for end, data in (("jpg", IMAGE), (kind, text.encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    images = list_images(tmp_path)
    assert images.classes == ("0", "7")
    assert images.labels.tolist() == [0, 1, 1, 0]


def several(images, labels):
    """Return an Example with several images and labels."""
    message = message_class()()
    message.features.feature["image/encoded"].bytes_list.value.extend(images)
    message.features.feature["image/class/label"].int64_list.value.extend(labels)
    return message.SerializeToString()


def test_a_record_with_several_labels_has_none_and_one_with_several_images_is_bad(tmp_path):
    payloads = [example(IMAGE, 3), example(IMAGE, 5), several([IMAGE], [3, 5]), several([IMAGE, IMAGE], [5])]
    write_records(tmp_path / "a.tfrecord", payloads)
    images = list_images(tmp_path)
    assert images.labels.tolist() == [0, 1, -1, 1]
    assert images.read(2) == IMAGE
    with pytest.raises(BadSample, match="2 images in image/encoded"):
        images.read(3)


def test_records_that_were_packed_are_read_from_the_shards(tmp_path):
    (tmp_path / "records").mkdir()
    write_records(tmp_path / "records" / "a.tfrecord", [example(IMAGE, n % 2) for n in range(4)])
    write_shards(tmp_path / "records", tmp_path / "once")
    write_shards(tmp_path / "once", tmp_path / "twice")
    for packed in (tmp_path / "once", tmp_path / "twice"):
        images = list_images(packed)
        assert [images.read(sample) for sample in range(len(images))] == [IMAGE] * 4
        assert images.labels.tolist() == [0, 1, 0, 1]


def test_a_mask_beside_a_named_image_of_its_key_is_no_sample(tmp_path):
    names = ["0.image.jpg", "0.mask.png", "0.depth.png", "1.left.jpg", "1.right.jpg", "2.mask.png"]
    write_tar(tmp_path / "a.tar", [(name, IMAGE) for name in names])
    images = list_images(tmp_path)
    assert [images.name(n).split("tar:")[1] for n in range(len(images))] == [names[0], *names[3:]]
    (row,) = images.source.left_out.rows()
    assert (row["count"], row["examples"]) == (2, ["a.tar:0.mask.png", "a.tar:0.depth.png"])
