"""An index is used only if it matches the file beside it; no sample is ever read by another's."""

from __future__ import annotations

import os
import shutil

import pytest
from made_images import encode, picture
from made_sources import example, write_records, write_tar

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources.shard_index import index_names

wds2idx = pytest.importorskip("wds2idx")


def block(number):
    """Return images of one length, so that only names and bytes distinguish shards."""
    return encode(picture(16, 16, number), "PPM")


def members(first, count=9, kind="ppm"):
    return [(f"class{number % 2}/{number:03d}.{kind}", block(number)) for number in range(first, first + count)]


def write_index(shard, index=None):
    with wds2idx.IndexCreator(str(shard), str(index or shard.with_suffix(".idx")), verbose=False) as creator:
        creator.create_index()


def contents(images):
    return {images.source.name(i): images.read(i) for i in range(len(images))}


def newer(path):
    """Make it look a minute newer than everything else."""
    when = path.stat().st_mtime_ns + 60_000_000_000
    os.utime(path, ns=(when, when))


def walked(path, tmp_path):
    """Return what the shard holds, read without an index."""
    bare = tmp_path / "bare" / path.name
    bare.parent.mkdir()
    shutil.copyfile(path, bare)
    return contents(list_images(bare))


def misfits(images):
    return sum(count for reason, count in images.source.left_out.counts.items() if "do not match" in reason)


def test_names_of_an_index_are_the_shards_own_and_wds2idxs():
    assert index_names("a.b/train.0000.tar") == ("a.b/train.0000.idx", "a.b/train.idx")
    assert index_names("shard-000000.tar") == ("shard-000000.idx",)
    assert index_names("x/.hidden.tar") == ("x/.hidden.idx",)


def test_one_index_for_dotted_names_is_used_for_its_own_shard_only(tmp_path, capfd):
    for number in range(3):
        shard = write_tar(tmp_path / f"train.{number:04d}.tar", members(9 * number))
        write_index(shard, tmp_path / "train.idx")
    images = list_images(tmp_path)
    assert [images.read(i) for i in range(27)] == [block(number) for number in range(27)]
    assert images.labels.tolist() == [number % 2 for number in range(27)]
    assert images.source._indexed == [False, False, True]
    assert "2 index(es) that do not match their shard" in capfd.readouterr().err


def test_an_index_of_its_own_goes_before_a_shared_one(tmp_path):
    for number in range(2):
        shard = write_tar(tmp_path / f"train.{number:04d}.tar", members(9 * number))
        write_index(shard, tmp_path / "train.idx")
        write_index(shard, tmp_path / f"train.{number:04d}.idx")
    images = list_images(tmp_path)
    assert images.source._indexed == [True, True]
    assert not images.source.left_out.counts


EXCHANGED = {"two exchanged": 2}  # the others are found when the index is compared
OLDER = {
    "other images": members(100),
    "one more": members(0, 10),
    "one less": members(0, 8),
    "another order": members(0)[::-1],
    "two exchanged": [*members(0)[:1], members(0)[2], members(0)[1], *members(0)[3:]],
    "one of another length": [*members(0)[:3], ("class1/003.ppm", block(3) + b"x" * 300), *members(0)[4:]],
    "a longer first": [("class0/000.ppm", block(0) + b"x" * 600), *members(0)[1:]],
    "a label among them": [*members(0)[:5], ("class0/004.cls", b"7"), *members(0)[5:]],
    "nothing in common": members(0, 9, "png"),
}


@pytest.mark.parametrize("shard", OLDER)
@pytest.mark.parametrize("times", ["older", "as new"])
def test_an_index_of_an_older_shard_gives_no_wrong_bytes(shard, times, tmp_path):
    """If older than its shard, it is compared member by member; else in a few places, and at each read."""
    path = write_tar(tmp_path / "s.tar", members(0))
    write_index(path)
    write_tar(path, OLDER[shard])
    newer(path if times == "older" else tmp_path / "s.idx")
    images = list_images(tmp_path)
    expected = walked(path, tmp_path)
    if times == "older":
        assert contents(images) == expected
        assert misfits(images) == 1
        return
    bad = 0
    for i in range(len(images)):
        try:
            raw = images.read(i)
        except BadSample:
            bad += 1
        else:
            assert raw == expected[images.source.name(i)]
    assert (misfits(images), bad) == ((0, EXCHANGED[shard]) if shard in EXCHANGED else (1, 0))


def test_an_index_older_than_its_shard_is_used_where_it_fits(tmp_path, capfd):
    path = write_tar(tmp_path / "s.tar", members(0))
    write_index(path)
    newer(path)
    images = list_images(tmp_path)
    assert images.source._indexed == [True]
    assert [images.read(i) for i in range(9)] == [block(number) for number in range(9)]
    assert not capfd.readouterr().err


TORN = {
    "no bytes": lambda _: b"",
    "its first line": lambda text: text[:5],
    "half": lambda text: text[: len(text) // 2],
    "a line less": lambda text: b"\n".join(text.split(b"\n")[:-2]) + b"\n",
    "a line less and its count": lambda text: b"v1.2 8\n" + b"\n".join(text.split(b"\n")[1:-2]) + b"\n",
    "a line less in the middle": lambda text: (
        b"v1.2 8\n" + b"\n".join([*text.split(b"\n")[1:4], *text.split(b"\n")[5:]])
    ),
    "its last letters": lambda text: text[:-6] + b"\n",
    "another version": lambda text: text.replace(b"v1.2", b"v1.3"),
    "other numbers": lambda text: text.replace(b" 512 ", b" 1024 "),
    "beyond the end": lambda text: text.replace(b" 512 ", b" 99999999999 "),
    "below zero": lambda text: text.replace(b" 512 ", b" -512 "),
    "no numbers": lambda text: text.replace(b" 512 ", b" x "),
    "something else": lambda _: b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("what", TORN)
def test_a_torn_index_is_not_used_and_counted(what, tmp_path):
    path = write_tar(tmp_path / "s.tar", members(0))
    write_index(path)
    text = (tmp_path / "s.idx").read_bytes()
    assert TORN[what](text) != text
    (tmp_path / "s.idx").write_bytes(TORN[what](text))
    images = list_images(tmp_path)
    assert contents(images) == walked(path, tmp_path)
    assert misfits(images) == 1


def test_a_shard_that_lost_its_end_is_not_read_by_its_index(tmp_path):
    path = write_tar(tmp_path / "s.tar", members(0))
    write_index(path)
    os.truncate(path, 1536 * 5)
    newer(tmp_path / "s.idx")
    images = list_images(tmp_path)
    assert len(images) == 5
    assert sorted(images.source.left_out.counts.values()) == [1, 1]  # the index, and the missing end


@pytest.mark.parametrize("names", [["a b.ppm", "c.ppm"], ["a 1 2 3.ppm"], ["größe.ppm"], ["x" * 120 + ".ppm", "b.ppm"]])
def test_names_that_an_index_cannot_hold_come_from_the_shard(names, tmp_path):
    path = write_tar(tmp_path / "s.tar", [(name, block(number)) for number, name in enumerate(names)])
    write_index(path)
    images = list_images(path)
    assert contents(images) == {f"s.tar:{name}": block(number) for number, name in enumerate(names)}


def test_what_changes_while_it_is_read_by_its_index_is_a_bad_sample(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{n}.{kind}", block(n)) for n in range(9) for kind in ("cls", "ppm")])
    write_index(path)
    images = list_images(tmp_path)
    write_tar(path, [(f"{n + 1}.{kind}", block(n + 1)) for n in range(9) for kind in ("cls", "ppm")])
    for i in range(len(images)):
        with pytest.raises(BadSample, match="the shard changed"):
            images.read(i)


def test_a_damaged_header_is_no_reason_to_doubt_an_index(tmp_path):
    path = write_tar(tmp_path / "s.tar", members(0))
    write_index(path)
    raw = bytearray(path.read_bytes())
    raw[1536 * 4 + 110] ^= 1  # of the middle one, where the index is compared
    path.write_bytes(raw)
    images = list_images(tmp_path)
    assert len(images) == 9
    assert images.read(4) == block(4)


def as_records(path, first, count=9):
    return write_records(path, [example(block(number), number) for number in range(first, first + count)], index=True)


RECORDS = {
    "another file's": lambda _: b"".join(b"%d %d\n" % (100 * n, 100) for n in range(9)),
    "a line less": lambda text: b"\n".join(text.split(b"\n")[:-2]) + b"\n",
    "half a line": lambda text: text[:-9],
    "one line of two": lambda text: b"0 " + text.split()[-2] + b"\n" + b"\n".join(text.split(b"\n")[-2:]),
    "no bytes": lambda _: b"",
    "no numbers": lambda _: b"offset length\n",
    "numbers too large": lambda _: b"0 99999999999999999999999\n",
}


@pytest.mark.parametrize("what", RECORDS)
def test_an_index_of_records_that_does_not_fit_is_not_used(what, tmp_path):
    as_records(tmp_path / "a.tfrecord", 0)
    index = tmp_path / "a.tfrecord.idx"
    index.write_bytes(RECORDS[what](index.read_bytes()))
    images = list_images(tmp_path)
    assert [images.read(i) for i in range(len(images))] == [block(number) for number in range(9)]
    assert images.classes == tuple(map(str, range(9)))
    assert misfits(images) == 1


def test_an_index_of_records_of_another_file_is_not_used(tmp_path):
    """a.tfrecord and a.tfrecords share a.idx; if the index fits the file's length, the records decide."""
    sizes = [len(block(0)), len(block(0)) + 50]
    for name, order in (("a.tfrecord", sizes), ("a.tfrecords", sizes[::-1])):
        payloads = [example(b"x" * size, 1) for size in order * 4]
        write_records(tmp_path / name, payloads, index=True)
    (tmp_path / "a.tfrecords.idx").unlink()
    (tmp_path / "a.tfrecord.idx").rename(tmp_path / "a.idx")
    images = list_images(tmp_path)
    assert [len(images.read(i)) for i in range(16)] == sizes * 4 + sizes[::-1] * 4
    assert misfits(images) == 1


def test_a_record_file_that_is_cut_off_says_so(tmp_path):
    offsets = as_records(tmp_path / "a.tfrecord", 0)
    os.truncate(tmp_path / "a.tfrecord", offsets[8] + 5)
    images = list_images(tmp_path)
    assert [images.read(i) for i in range(len(images))] == [block(number) for number in range(8)]
    assert len(images.source.left_out.counts) == 2  # its index, and its end
