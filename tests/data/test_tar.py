"""Tar files as people make them: each holds the same as its folder, or says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile

import pytest
from made_images import encode, picture
from made_sources import entry, write_tar

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources.tar import name_of
from iwm_fast.errors import UserError

A, B, C = (encode(picture(40, 30 + n, n)) for n in range(3))


def contents(images):
    return {images.name(i).partition(".tar:")[2]: images.read(i) for i in range(len(images))}


def left_out(images):
    return images.source.left_out.counts


@pytest.fixture
def folder(tmp_path):
    """Write classes with names of all kinds, hidden files, links within."""
    root = tmp_path / "images"
    names = [
        "cat/1.jpg",
        "cat/a b.jpg",
        "dog/dots.a.b.jpg",
        "dog/ü.JPG",
        os.fsdecode(b"dog/latin\xe9.png"),
        "dog/new\nline.jpg",
    ]
    names += [f"ox/{'deep/' * 40}{'x' * 120}.jpg", "ox/scan_0.1.png", "ox/scan_0.2.png"]
    hidden = ["cat/.ipynb_checkpoints/1.jpg", "cat/._1.jpg", "__MACOSX/2.jpg", ".git/3.jpg"]
    for number, name in enumerate(names + hidden):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture(30 + number, 20, number)))
    (root / "dog" / "notes.txt").write_text("a text")
    os.link(root / "cat/1.jpg", root / "dog/hard.jpg")
    (root / "dog" / "soft.jpg").symlink_to("../cat/1.jpg")
    (root / "dog" / "soft of soft.jpg").symlink_to("soft.jpg")
    return root


WAYS = {
    "of its classes": ["-C", "{root}", "__MACOSX", "cat", "dog", "ox"],
    "of a dot": ["-C", "{root}", "."],
    "pax": ["--format=pax", "-C", "{root}", "."],
    "old gnu": ["--format=oldgnu", "-C", "{root}", "."],
    "sorted": ["--sort=name", "-C", "{root}", "."],
    "absolute": ["-P", "--transform=s,^{root},,", "{root}/cat", "{root}/dog", "{root}/ox"],
    "from above": ["-P", "-C", "{root}/cat", "../cat", "../dog", "../ox"],
}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("indexed", [False, True], ids=["walked", "indexed"])
def test_a_tar_of_a_folder_has_its_classes_labels_and_bytes(way, indexed, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    words = [word.replace("{root}", str(folder)) for word in WAYS[way]]
    subprocess.run(["tar", "-cf", out / "a.tar", *words], check=True, capture_output=True)
    if indexed:
        wds2idx = pytest.importorskip("wds2idx")
        with wds2idx.IndexCreator(str(out / "a.tar"), str(out / "a.idx"), verbose=False) as creator:
            creator.create_index()
    plain, packed = list_images(folder), list_images(out)
    assert packed.classes == plain.classes == ("cat", "dog", "ox")
    expected = {plain.source.name(i): plain.read(i) for i in range(len(plain))}
    assert len(expected) == 12
    assert contents(packed) == expected
    by_name = {packed.source.name(i).partition(":")[2]: packed.labels[i] for i in range(len(packed))}
    assert by_name == {plain.source.name(i): plain.labels[i] for i in range(len(plain))}


def test_names_have_one_form():
    written = [
        "./a/b.png",
        "/a/b.png",
        "../a/b.png",
        "a//b.png",
        "a/./b.png",
        "c/../a/b.png",
        "././a/b.png",
        "a/b.png/",
    ]
    assert {name_of(name) for name in written} == {"a/b.png"}
    assert name_of("./") == name_of("/") == name_of("..") == ""


def test_what_is_no_sample_is_counted_in_one_line(tmp_path, capfd):
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.size, sparse.pax_headers = 512, {"GNU.sparse.map": "0,512", "GNU.sparse.size": "1024"}
    members = [
        ("a.jpg", A),
        ("a.json", b"{}"),
        ("README.md", b"x"),
        ("b.mask.png", B),
        ("b.jpg", B),
        ("a.jpg", C),
        entry("gone.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
        entry("away.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        entry("round.jpg", tarfile.SYMTYPE, "round.jpg"),
        entry("folder.jpg", tarfile.DIRTYPE),
        entry("pipe.jpg", tarfile.FIFOTYPE),
        entry("disk.jpg", tarfile.BLKTYPE),
        (sparse, b"x" * 512),
        (".hidden.jpg", A),
        ("empty.jpg", b""),
    ]
    images = list_images(write_tar(tmp_path / "s.tar", members, format=tarfile.PAX_FORMAT))
    names = [images.source.name(i) for i in range(len(images))]
    assert names == ["s.tar:a.jpg", "s.tar:b.jpg", "s.tar:empty.jpg"]
    assert [images.read(0), images.read(1)] == [C, B]  # the later of two of one name, as in tar
    with pytest.raises(BadSample, match="the member is empty"):
        images.read(2)
    assert sorted(left_out(images).values()) == [1, 1, 1, 1, 3]
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{tmp_path}/s.tar: left out: ")
    for words in (
        "1 member(s) that a later one of the same name replaces (s.tar:a.jpg)",
        "1 sparse member(s)",
        "3 link(s) to files outside their shard (s.tar:gone.jpg, s.tar:away.jpg, s.tar:round.jpg)",
        "1 member(s) of a key without an image: 1 .md (s.tar:README.md)",
        "1 image(s) with a longer extension, of a key with a plain one (s.tar:b.mask.png)",
    ):
        assert words in said
    list_images(tmp_path / "s.tar")
    assert not capfd.readouterr().err  # once


def test_a_tar_of_images_says_nothing(tmp_path, capfd):
    list_images(write_tar(tmp_path / "s.tar", [("a.jpg", A), ("a.cls", b"1"), ("a.json", b"{}"), ("b.jpg", B)]))
    assert not capfd.readouterr().err


JOINED = {
    "one after the other": lambda a, b: a + b,
    "a block of zeros between": lambda a, b: (
        a.rstrip(b"\0").ljust(-(-len(a.rstrip(b"\0")) // 512) * 512, b"\0") + bytes(512) + b
    ),
    "much room behind": lambda a, b: a + bytes(512 * 301) + b + bytes(100_000),
}


@pytest.mark.parametrize("how", JOINED)
def test_concatenated_archives_are_read_to_the_end(how, tmp_path):
    a, b = (
        write_tar(tmp_path / name, members).read_bytes()
        for name, members in (("a", [("1.jpg", A), ("2.jpg", B)]), ("b", [("3.jpg", C), ("1.jpg", B)]))
    )
    (tmp_path / "s.tar").write_bytes(JOINED[how](a, b))
    images = list_images(tmp_path / "s.tar")
    assert contents(images) == {"2.jpg": B, "3.jpg": C, "1.jpg": B}
    assert list(left_out(images).values()) == [1]  # the first 1.jpg


@pytest.mark.parametrize(
    ("keep", "whole"),
    [(0, 2), (100, 2), (512, 3), (512 + 700, 3)],
    ids=["between members", "in a header", "behind a header", "in the data"],
)
def test_a_shard_that_is_cut_off_says_so(keep, whole, tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", A), ("b.jpg", B), ("c.jpg", C)])
    with tarfile.open(path) as archive:
        os.truncate(path, archive.getmember("c.jpg").offset + keep)
    images = list_images(path)
    assert len(images) == whole
    assert [images.read(0), images.read(1)] == [A, B]
    assert sum(count for reason, count in left_out(images).items() if "truncated" in reason) == 1
    if whole == 3:
        with pytest.raises(BadSample, match=r"its shard ends \d+ bytes before"):
            images.read(2)


def test_what_lies_behind_the_end_is_counted(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", A)])
    path.write_bytes(path.read_bytes() + b"a signature" * 100)
    images = list_images(path)
    assert contents(images) == {"a.jpg": A}
    assert list(left_out(images).values()) == [1]


def test_an_empty_archive_among_others_is_counted_and_alone_an_error(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match=r"holds no image.*1 shard\(s\) without an image \(a\.tar\)"):
        list_images(tmp_path)
    write_tar(tmp_path / "b.TAR", [("a.jpg", A)])
    assert left_out(list_images(tmp_path)) == {"shard(s) without an image": 1}


KEYS = {
    "left and right": (["a.left.jpg", "a.right.jpg"], 2, 0),
    "scans": ([f"x/scan_0.{n}.png" for n in range(12)], 12, 0),
    "two formats": (["a.jpg", "a.png"], 2, 0),
    "a mask before": (["a.seg.png", "a.jpg", "b.jpg"], 2, 1),
    "apart": (["a.left.jpg", "b.left.jpg", "a.right.jpg", "b.right.jpg"], 4, 0),
    "dotted folders": (["v1.0/a.jpg", "v1.0/b.jpg"], 2, 0),
}


@pytest.mark.parametrize("what", KEYS)
def test_all_images_of_a_key_are_samples_or_counted(what, tmp_path):
    names, samples, further = KEYS[what]
    images = list_images(write_tar(tmp_path / "s.tar", [(name, A) for name in names]))
    assert (len(images), sum(left_out(images).values())) == (samples, further)


LABELS = {
    "behind": ["1.jpg", "1.cls", "2.jpg", "2.cls"],
    "before": ["1.cls", "1.jpg", "2.cls", "2.jpg"],
    "apart": ["1.jpg", "2.jpg", "2.cls", "1.cls"],
    "in capitals": ["1.JPG", "1.CLS", "2.JPG", "2.CLS"],
    "as class": ["1.jpg", "1.class", "2.jpg", "2.class"],
    "as json": ["1.json", "1.jpg", "2.jpg", "2.json"],
    "of dotted names": ["a.1.jpg", "a.1.cls", "a.2.cls", "a.2.jpg"],
    "a caption beside": ["1.jpg", "1.txt", "1.cls", "2.jpg", "2.txt", "2.cls"],
}


@pytest.mark.parametrize("what", LABELS)
def test_a_label_is_found_wherever_it_stands(what, tmp_path):
    members = []
    for name in LABELS[what]:
        label = 7 if "1" in name else 30
        ending = name.rsplit(".")[-1].lower()
        data = {"jpg": A, "txt": b"a picture", "json": b'{"caption": "x", "label": %d}' % label}.get(
            ending, b"%d\n" % label
        )
        members.append((name, data))
    images = list_images(write_tar(tmp_path / "s.tar", members))
    assert images.classes == ("7", "30")
    assert images.labels.tolist() == [0, 1]


def test_a_label_of_a_key_is_that_of_all_its_images(tmp_path):
    members = [("a.cls", b"cat"), ("a.l.jpg", A), ("a.r.jpg", B), ("b.r.cls", b"ox"), ("b.cls", b"cat"), ("b.r.jpg", C)]
    images = list_images(write_tar(tmp_path / "s.tar", members))
    assert [images.classes[label] for label in images.labels] == ["cat", "cat", "ox"]


@pytest.mark.parametrize("text", [b"{}", b"no json", b"[3]", b'{"label": [1, 2]}', b'{"label": null}', b"\x7b" * 3000])
def test_json_that_is_no_label_leaves_the_folders(text, tmp_path):
    members = [(f"{name}/1.{kind}", data) for name in "ab" for kind, data in (("jpg", A), ("json", text))]
    images = list_images(write_tar(tmp_path / "s.tar", members))
    assert images.classes == ("a", "b")


def test_lists_of_classes_of_every_kind(tmp_path):
    """With a byte order mark, Windows line ends, two equal lines, and one list per folder of shards."""
    members = [("1.jpg", A), ("1.cls", b"2"), ("2.jpg", B), ("2.cls", b"0"), ("3.jpg", C), ("3.cls", b"ox")]
    write_tar(tmp_path / "a" / "s.tar", members)
    (tmp_path / "a" / "classes.txt").write_bytes("\ufeffcrane\r\nox\r\ncrane\r\n".encode())
    images = list_images(tmp_path / "a")
    assert images.classes == ("crane", "ox", "crane (2)")
    assert images.labels.tolist() == [2, 0, 1]
    write_tar(tmp_path / "b" / "s.tar", [("1.jpg", A), ("1.cls", b"0")])
    (tmp_path / "b" / "classes.txt").write_text("ape\n")
    images = list_images(tmp_path)
    assert [images.classes[label] for label in images.labels] == ["crane (2)", "crane", "ox", "ape"]
    write_tar(tmp_path / "b" / "s.tar", [("1.jpg", A), ("1.cls", b"cow")])
    with pytest.raises(UserError, match=r"b/s\.tar:1\.jpg: its label 'cow' is neither a whole number nor a line of"):
        _ = list_images(tmp_path).labels
