from __future__ import annotations

import errno
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from dali_readers import dali_records, dali_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import encode, picture
from made_sources import example, write_classes, write_records
from made_sources import write_tar as tar

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images, split
from iwm_fast.data.sources import storage
from iwm_fast.data.sources.left_out import SKIPPED
from iwm_fast.data.sources.names import Names, escape, unescape
from iwm_fast.data.sources.opening import REPEATED, open_source
from iwm_fast.data.sources.storage import DataGone, LocalStorage
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError

IMAGE = encode(picture(40, 30))
READ = ".bmp, .jfif, .jpe, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"


def contents(images):
    return [images.read(i) for i in range(len(images))]


def as_records(root, out, *, files=2, index=False):
    """Return the images of a class folder as TFRecord files, in their order; labels from 1 as in ImageNet."""
    out.mkdir()
    images = list_images(root)
    payloads = [example(images.read(i), int(images.labels[i]) + 1) for i in range(len(images))]
    each = -(-len(payloads) // files)
    for number in range(files):
        path = out / f"train-{number:05d}-of-{files:05d}"
        write_records(path, payloads[number * each : (number + 1) * each], index=index)
    return out


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "images", 13)
    return tmp_path / "images"


@pytest.fixture(params=["shards", "shards without index", "tfrecord", "tfrecord with index", "manifest of shards"])
def packed(request, folder, tmp_path):
    """Return the images of `folder` in another form, in the same order."""
    out = tmp_path / "packed"
    if request.param.startswith("tfrecord"):
        return as_records(folder, out, index="with" in request.param)
    write_shards(folder, out, shard_bytes=20_000)
    assert len(list(out.glob("*.tar"))) > 1
    if "without" in request.param:
        for index in out.glob("*.idx"):
            index.unlink()
    if "manifest" in request.param:
        write_index(out)
    return out


def test_every_form_holds_the_same_bytes_labels_and_unique_names(packed, folder):
    plain, images = list_images(folder), list_images(packed)
    assert contents(images) == contents(plain)
    assert images.labels.tolist() == plain.labels.tolist()
    assert len(images.classes) == 2
    names = [images.name(i) for i in range(len(images))]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"{packed}/") for name in names)
    assert [len(raw) for raw in contents(images)] == [images.source.size(i) for i in range(len(images))]


def test_the_place_that_a_source_tells_holds_the_bytes(packed):
    images = list_images(packed)
    for i, raw in enumerate(contents(images)):
        piece, offset = images.source.extent(i)
        assert images.source.storage.read(piece, offset, len(raw)) == raw


def test_sources_go_to_other_processes(packed):
    images = list_images(packed)
    assert contents(pickle.loads(pickle.dumps(images))) == contents(images)


def test_taken_rows_keep_their_labels(packed):
    images = list_images(packed)
    some = images.take(np.array([5, 2, 9])).take(np.array([2, 0]))
    assert contents(some) == [images.read(9), images.read(5)]
    assert some.labels.tolist() == images.labels[[9, 5]].tolist()


def test_split_works_on_packed_images_and_on_their_own_parts(packed, tmp_path):
    train, test = split(packed)
    assert (len(train), len(test)) == (10, 3)
    whole = tmp_path / "whole"
    whole.mkdir()
    for part in ("train", "test"):
        (whole / part).symlink_to(packed)
    train, test = split(whole)
    assert (len(train), len(test), train.classes) == (13, 13, test.classes)


def test_dali_reads_our_shards_as_we_do(folder, tmp_path):
    write_shards(folder, tmp_path / "out", shard_bytes=20_000)
    shards = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    rows = dali_shards(shards, [shard.replace(".tar", ".idx") for shard in shards], ["jpg", "cls"])
    images = list_images(tmp_path / "out")
    assert [image for image, _ in rows] == contents(images)
    assert [int(label.tobytes()) for _, label in rows] == images.labels.tolist()


def test_dali_reads_tfrecords_as_we_do(folder, tmp_path):
    out = as_records(folder, tmp_path / "out", index=True)
    files = sorted(str(path) for path in out.iterdir() if path.suffix != ".idx")
    rows = dali_records(files, [f"{file}.idx" for file in files])
    images = list_images(out)
    assert [image for image, _ in rows] == contents(images)
    assert [str(int(label[0])) for _, label in rows] == [images.classes[label] for label in images.labels]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_a_walk_finds_what_dalis_index_says(form, tmp_path, monkeypatch):
    """Hidden members, folders, long names, samples of several members; compared with wds2idx where it can count."""
    wds2idx = pytest.importorskip("wds2idx")
    members = [("a/1.jpg", IMAGE), ("a/1.cls", b"3"), ("a/.x.jpg", b"no"), ("b.json", b"{}"), ("b.png", IMAGE[:-1])]
    path = tar(tmp_path / "s.tar", [*members, ("c.seg.png", b"0"), ("c.jpg", IMAGE)], format=form)
    walked = list_images(tmp_path)
    names = [walked.name(i).split(":")[1] for i in range(len(walked))]
    assert names == ["a/1.jpg", "b.png", "c.jpg"]  # the picture with its key's name, not the mask before it
    with wds2idx.IndexCreator(str(path), str(tmp_path / "s.idx"), verbose=False) as creator:
        creator.create_index()
    indexed = list_images(tmp_path)
    assert [indexed.name(i) for i in range(len(indexed))] == [walked.name(i) for i in range(len(walked))]
    assert contents(indexed) == contents(walked) == [IMAGE, IMAGE[:-1], IMAGE]
    long = tar(tmp_path / "long" / "s.tar", [(f"{'x' * 150}/{'y' * 150}.jpg", IMAGE)], format=form)
    assert contents(list_images(long)) == [IMAGE]


def test_an_index_of_version_1_1_has_no_names_and_the_shard_has(tmp_path):
    path = tar(tmp_path / "s.tar", [("a.jpg", IMAGE), ("b.jpg", IMAGE[:-1])])
    with tarfile.open(path) as archive:
        lines = [f"jpg {entry.offset_data} {entry.size}\n" for entry in archive]
    (tmp_path / "s.idx").write_text("v1.1 2\n" + "".join(lines))
    images = list_images(path)
    assert contents(images) == [IMAGE, IMAGE[:-1]]
    assert images.name(1) == f"{path}:b.jpg"


def test_labels_without_a_list_of_classes_are_sorted_as_numbers(tmp_path):
    members = [(f"{i}.{kind}", data) for i in range(12) for kind, data in (("jpg", IMAGE), ("cls", b"%d" % i))]
    images = list_images(tar(tmp_path / "s.tar", members))
    assert images.classes == tuple(map(str, range(12)))
    assert images.labels.tolist() == list(range(12))


def test_a_shard_cut_off_in_its_last_member_costs_that_member_only(tmp_path):
    path = tar(tmp_path / "s.tar", [("a.jpg", IMAGE), ("b.jpg", IMAGE)])
    os.truncate(path, 512 * 2 + len(IMAGE) + 512 + 100)
    images = list_images(path)
    assert images.read(0) == IMAGE
    with pytest.raises(BadSample, match=r"its shard ends \d+ bytes before the member does"):
        images.read(1)


def damaged(raw, at):
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("at", "reason"), [(200, "checksum is wrong"), (3, "length is damaged"), (9, "length is damaged")]
)
def test_a_record_with_a_flipped_bit_is_a_bad_sample(tmp_path, at, reason):
    path = tmp_path / "a.tfrecord"
    offsets = write_records(path, [example(IMAGE, label) for label in (1, 2, 3)], index=True)
    path.write_bytes(damaged(path.read_bytes(), offsets[1] + at))
    images = list_images(path)
    assert (images.read(0), images.read(2)) == (IMAGE, IMAGE)
    with pytest.raises(BadSample, match=reason):
        images.read(1)
    assert [images.classes[label] for label in images.labels[[0, 2]]] == ["1", "3"]
    assert images.name(1) == f"{path}:{offsets[1]}"


def test_a_record_without_an_image_is_a_bad_sample(tmp_path):
    write_records(tmp_path / "a.tfrecord", [b"", b"\xff\xff\xff", example(b"", 1)])
    images = list_images(tmp_path)
    for sample, reason in enumerate(["no image/encoded", "not a tf.train.Example", "empty"]):
        with pytest.raises(BadSample, match=reason):
            images.read(sample)


WRONG = {
    "two kinds": (lambda root: [tar(root / "a.tar", []), (root / "b.jpg").write_bytes(IMAGE)], "set data.source to"),
    "shards without images": (lambda root: tar(root / "a.tar", [("a.txt", b"x")]), "are without one"),
    "a torn tar": (lambda root: (root / "a.tar").write_bytes(b"x" * 5000), "not a whole tar file"),
    "packed shards": (lambda root: (root / "a.tar").write_bytes(b"\x1f\x8b" + b"x" * 5000), "looks gzip-compressed"),
    "shards packed with zstd": (lambda root: (root / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 5000), "zstd"),
    "a shard of no bytes": (lambda root: (root / "a.tar").write_bytes(b""), r"not a whole tar file \(it is empty\)"),
    "packed shards by their name": (lambda root: (root / "a.tar.gz").write_bytes(b""), "decompress them"),
    "no records": (lambda root: (root / "a.tfrecord").write_bytes(b"x" * 50), "no TFRecord begins at byte 0"),
    "packed records": (lambda root: (root / "a.tfrecord").write_bytes(b"\x1f\x8b" + b"x" * 50), "gzip"),
    "a table of something else": (lambda root: (root / "iwm-fast-manifest.tsv").write_text("a\tb\n"), "not a complete"),
    "a damaged header in the middle": (
        lambda root: (root / "a.tar").write_bytes(
            tar(root / "b.tar", [("a.jpg", IMAGE)]).read_bytes()[: 512 - len(IMAGE) // -512 * 512] + b"x" * 5120
        ),
        "no header at byte",
    ),
    "labels beyond the classes": (
        lambda root: [
            tar(root / "a.tar", [("a.jpg", IMAGE), ("a.cls", b"2")]),
            (root / "classes.txt").write_text("x\n"),
        ],
        "has 1 lines, but there are labels from 2 to 2",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_opened_is_one_line_that_names_it(what, tmp_path):
    make, words = WRONG[what]
    make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        _ = list_images(tmp_path).labels
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_requested_source_is_taken_among_several(tmp_path):
    tar(tmp_path / "a.tar", [("x.jpg", IMAGE)])
    (tmp_path / "b.jpg").write_bytes(IMAGE)
    write_records(tmp_path / "c.tfrecord", [example(IMAGE)])
    ends = {kind: list_images(tmp_path, kind).name(0) for kind in ("folder", "webdataset", "tfrecord")}
    assert ends == {
        "folder": f"{tmp_path}/b.jpg",
        "webdataset": f"{tmp_path}/a.tar:x.jpg",
        "tfrecord": f"{tmp_path}/c.tfrecord:0",
    }
    (tmp_path / "c.tfrecord").unlink()
    with pytest.raises(UserError, match=r"holds no \.tfrecord files among 2 files; data.source is tfrecord"):
        list_images(tmp_path, "tfrecord")


def test_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.jpg")
    images = list_images(tmp_path)
    reasons = {}
    for i in range(len(images)):
        with pytest.raises(BadSample) as caught:
            images.read(i)
        reasons[Path(images.name(i)).name] = caught.value.reason
    assert reasons == {
        "empty.jpg": "the file is empty",
        "nowhere.jpg": "cannot be read: No such file or directory",
        "pipe.jpg": "the file is empty",
    }


def test_a_file_that_may_not_be_read_is_a_bad_sample():
    root = os.geteuid() == 0  # root may read everything
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "secret.jpg"
        path.write_bytes(IMAGE)
        path.chmod(0)
        path.parent.chmod(0o755)
        images = list_images(folder)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(BadSample, match="cannot be read: Permission denied"):
                images.read(0)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_folder_that_is_gone_is_an_error_and_no_bad_sample(tmp_path, left):
    root = tmp_path / "images"
    write_classes(root, 4)
    images = list_images(root)
    root.rename(tmp_path / "elsewhere")
    if left == "an empty folder":
        (root / "dog").mkdir(parents=True)
    with pytest.raises(DataGone, match=r"the data folder is (gone|empty)") as caught:
        images.read(2)
    assert str(caught.value).startswith(str(root))


@pytest.mark.parametrize("left", ["gone (No such file or directory)", "empty"])
def test_a_class_folder_that_was_removed_costs_its_own_images_only(tmp_path, left):
    write_classes(tmp_path, 4)
    images = list_images(tmp_path)
    lost = Path(images.name(0)).parent
    shutil.rmtree(lost)
    if left == "empty":
        lost.mkdir()
    with pytest.raises(BadSample) as caught:
        images.read(0)
    assert caught.value.reason == f"cannot be read: its folder {lost} is {left}"
    assert images.read(len(images) - 1)


def test_a_class_folder_on_a_disk_of_its_own_that_goes_away_is_waited_for(tmp_path):
    """A link to another disk that is broken, as after a lost mount, comes back."""
    write_classes(tmp_path / "root", 4)
    lost = tmp_path / "root" / "cat"
    lost.rename(tmp_path / "other disk")
    lost.symlink_to(tmp_path / "other disk")
    images = list_images(tmp_path / "root")
    (tmp_path / "other disk").rename(tmp_path / "away")
    with pytest.raises(DataGone, match="cat: the data folder is gone"):
        images.read(0)


def test_a_class_folder_that_is_a_mount_is_waited_for_when_it_drops(tmp_path, monkeypatch):
    """A lost mount leaves an empty folder, as does a user who empties one."""
    write_classes(tmp_path, 4)
    mount = str(tmp_path / "cat")
    real = os.stat

    def on_another_disk(path, *rest, **more):
        found = real(path, *rest, **more)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:])) if path == mount else found

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", on_another_disk)
        images = list_images(tmp_path)
    shutil.rmtree(mount)
    Path(mount).mkdir()
    with pytest.raises(DataGone, match="cat: the data folder is empty"):
        images.read(0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_this_process_cannot_do_is_no_bad_sample(tmp_path, monkeypatch, number):
    write_classes(tmp_path, 2)
    images = list_images(tmp_path)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=f"cannot be read: {os.strerror(number)}"):
        images.read(0)


OTHERS = ("cat/a.heic", "cat/b.HEIC", "dog/c.gif", "notes.txt", "README", "set.tar.gz", ".hidden.txt", "cat/Thumbs.db",
          "desktop.ini", "cat/1.jpg~", "lost+found/x.txt")  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "shards", "tfrecord"])
def test_files_of_other_types_are_counted_by_type_in_one_line(form, folder, tmp_path, capsys):
    if form == "folder":
        root = folder
    elif form == "shards":
        root = tmp_path / "packed"
        write_shards(folder, root, shard_bytes=20_000)
    else:
        root = as_records(folder, tmp_path / "packed", index=True)
    list_images(root)
    assert capsys.readouterr().err == ""  # an index, shards.json and the classes belong to their shards
    for name in OTHERS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    images = list_images(root)
    list_images(root)
    packed = [] if form == "folder" else [".tar.gz"]
    expected = {".heic": 2, ".gif": 1, ".tar.gz": 1, ".txt": 1, "without extension": 1}
    expected = {kind: count for kind, count in expected.items() if kind not in packed}
    (row,) = (row for row in images.source.left_out.rows() if row["reason"] == SKIPPED)
    assert row["types"] == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    shown = ", ".join(f"{count} {kind}" for kind, count in expected.items())
    assert lines == [f"{root}: skipped {row['count']} files: {shown} (read: {READ})"]


def test_members_without_an_image_are_counted_by_type(tmp_path, capsys):
    members = [("a.jpg", IMAGE), ("a.txt", b"caption"), ("b.heic", b"x"), ("c.heic", b"x"), ("d.cls", b"1")]
    images = list_images(tar(tmp_path / "s.tar", members))
    (row,) = images.source.left_out.rows()
    assert row["types"] == {".heic": 2, ".cls": 1}
    said = "3 member(s) of a key without an image: 2 .heic, 1 .cls (s.tar:b.heic, s.tar:c.heic, s.tar:d.cls)"
    assert capsys.readouterr().err == f"{tmp_path}/s.tar: left out: {said}\n"


def test_a_folder_without_an_image_says_what_is_there(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.x{number}").write_text("x")
    (tmp_path / "a.heic").write_text("x")
    (tmp_path / "b.heic").write_text("x")
    with pytest.raises(UserError, match=r"holds 11 files \(2 \.heic, 1 \.x0, .*, 4 of 4 other types\), none of"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir", ".Trash-1000"])
def test_folders_of_the_system_are_no_classes_and_are_not_entered(tmp_path, monkeypatch, name):
    write_classes(tmp_path, 2)
    plain = list_images(tmp_path)
    write_classes(tmp_path / name, 2)
    entered = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(str(path)) or real(path))
    images = list_images(tmp_path)
    assert (len(images), images.classes) == (len(plain), plain.classes)
    assert not any(name in path for path in entered)
    expected = [] if name.startswith(".") else [{"count": 1, "reason": "folder(s) of the system", "examples": [name]}]
    assert images.source.left_out.rows() == expected


def test_a_class_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    write_classes(tmp_path, 2)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="dog cannot be listed: Permission denied"):
        list_images(tmp_path)


def test_more_than_what_is_left_is_what_there_is(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    storage = LocalStorage(tmp_path)
    assert storage.read("a", 7, 100) == b"789"
    assert storage.read("a", 100) == storage.read("a", 100, 5) == b""
    assert storage.size("a") == 10


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(["", "a\tb", "\\t", "\\\\n", "\udc80", "ü"])))
def test_names_come_back(names):
    packed = Names.of(names)
    assert list(packed) == names
    assert list(packed[1:3]) == names[1:3]
    assert [unescape(escape(name)) for name in names] == names
    assert not any(set("\t\n\r") & set(escape(name)) for name in names)


def test_a_hundred_thousand_names_take_little_more_than_their_letters():
    packed = Names.of(f"class{i % 10}/{i:08d}.jpg" for i in range(100_000))
    assert sys.getsizeof(packed._text) + packed._starts.nbytes + packed._ends.nbytes < 4_000_000
    assert packed[99_999] == "class9/00099999.jpg"


def test_two_names_of_one_folder_are_one_class_and_the_other_name_is_said(tmp_path):
    cat, dog = tmp_path / "d/cat", tmp_path / "d/dog"
    for folder in (cat, dog):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(IMAGE)
    (tmp_path / "d/kitty").symlink_to(cat)
    (cat / "up").symlink_to("..")
    images = list_images(tmp_path / "d")
    assert images.classes == ("cat", "dog")
    assert len(images) == 2
    assert images.source.left_out.counts == {REPEATED: 2}


def test_an_empty_path_is_not_the_working_folder():
    with pytest.raises(UserError, match="the folder of images is an empty text; give its path"):
        open_source("")


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ESTALE, "its server has lost it: mount it again"), (errno.EACCES, "check its owner and permissions")],
)
def test_a_folder_that_cannot_be_listed_says_what_its_own_cause_asks_for(number, advice):
    with pytest.raises(UserError, match=rf"^/photos/cat cannot be listed: {os.strerror(number)}; {advice}$"):
        storage._refuse(OSError(number, os.strerror(number), "/photos/cat"))
