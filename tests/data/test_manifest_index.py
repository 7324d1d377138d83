"""A manifest is opened by its index, and a process holds none of its rows."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from made_sources import example, write_classes, write_records

from iwm_fast import file_locks
from iwm_fast.data import known_verdicts
from iwm_fast.data.identity import identity_of, names_digest
from iwm_fast.data.image_list import ImageSet, list_images
from iwm_fast.data.known_verdicts import KnownVerdicts
from iwm_fast.data.sources import DataGone, changes, manifest_index, manifest_scan, manifest_text, open_source
from iwm_fast.data.sources.changes import UNCOMPARED
from iwm_fast.data.sources.manifest_index import index_file
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError
from iwm_fast.long_work import listening

NAME = "iwm-fast-manifest.tsv"


@pytest.fixture(autouse=True)
def every_manifest_is_large(monkeypatch):
    monkeypatch.setattr(manifest_index, "WORTH_A_FILE", 0)


@pytest.fixture
def scans(monkeypatch):
    """The manifests that were read from the first row to the last."""
    found = []
    plain = manifest_index.scan

    def counted(text, *tell):
        found.append(text.shown)
        return plain(text, *tell)

    monkeypatch.setattr(manifest_index, "scan", counted)
    return found


def facts(root):
    """What a source of a manifest knows, row by row and of all."""
    images = list_images(root)
    return (
        [(images.source_name(i), images.source.size(i), images.source.verdict(i), images.read(i)) for i in range(77)],
        images.labels.tolist(),
        images.classes,
        identity_of(images),
        names_digest(images),
    )


def test_rows_are_the_same_with_an_index_as_without_and_only_writing_one_reads_all(tmp_path, scans, monkeypatch):
    made = write_classes(tmp_path, 77)  # two whole strides of rows and 13 more
    plain = list_images(tmp_path)
    expected = identity_of(plain), names_digest(plain)
    write_index(tmp_path, check=True)
    assert len(scans) == 1
    assert index_file(str(tmp_path / NAME)).is_file()
    indexed = facts(tmp_path)
    assert len(scans) == 1
    assert [row[3] for row in indexed[0]] == list(made.values())
    assert indexed[3:] == expected
    monkeypatch.setattr(manifest_index, "WORTH_A_FILE", 10**9)
    assert facts(tmp_path) == indexed
    assert len(scans) == 2


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_packed_images_are_the_same_list_with_a_manifest_as_without(tmp_path, scans, kind):
    made = write_classes(tmp_path / "images", 40)
    packed = tmp_path / "packed"
    if kind == "webdataset":
        write_shards(tmp_path / "images", packed, shard_bytes=20_000)
    else:
        packed.mkdir()
        for number in range(3):
            write_records(packed / f"{number}.tfrecord", [example(raw, 1) for raw in list(made.values())[number::3]])
    plain = list_images(packed)
    assert plain.source.kind == kind
    expected = identity_of(plain), names_digest(plain), plain.source.shards(), plain.labels
    assert 2 < len(expected[2]) < 40
    assert sum(expected[2].values()) == 40
    write_index(packed, check=True)
    scans.clear()
    images = list_images(packed)
    assert images.source.kind == kind
    found = identity_of(images), names_digest(images), images.source.shards(), images.labels
    assert found[:3] == expected[:3]
    assert (found[3] is None) == (expected[3] is None)
    assert [images.read(row) for row in range(40)] == [plain.read(row) for row in range(40)]
    assert images.unchecked == 0
    assert not scans


def test_a_large_manifest_without_an_index_says_that_it_is_read(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(manifest_index, "_WORTH_A_LINE", 77)
    write_classes(tmp_path, 77)
    write_index(tmp_path, tmp_path / "list.tsv")
    said = f"{tmp_path}/list.tsv: reading its 77 rows once, to write .list.tsv.rows beside it\n"
    assert capfd.readouterr().err == said
    list_images(tmp_path / "list.tsv")
    assert not capfd.readouterr().err


def test_while_a_large_manifest_is_read_lines_say_how_far_and_whoever_watches_learns_of_progress(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("RANK", "3")  # any rank may be the one that reads
    monkeypatch.setattr(manifest_index, "_WORTH_A_LINE", 77)
    monkeypatch.setattr(manifest_index, "_LINE_EVERY_S", 0.0)
    monkeypatch.setattr(manifest_text, "_PIECE", 1000)
    write_classes(tmp_path, 77)
    heard = []
    with listening(lambda: heard.append(1)):
        write_index(tmp_path, tmp_path / "list.tsv")
    first, *lines = capfd.readouterr().err.splitlines()
    assert first == f"{tmp_path}/list.tsv: reading its 77 rows once, to write .list.tsv.rows beside it"
    assert len(lines) == len(heard) > 2
    assert lines[-1] == f"{tmp_path}/list.tsv: read 77 of 77 rows, 0 s left"


def test_who_waits_for_the_index_takes_over_when_its_reader_is_killed(tmp_path, scans, monkeypatch):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    place = index_file(str(tmp_path / NAME))
    place.unlink()
    scans.clear()
    lock = place.with_name(f"{place.name}.lock").open("a+b")
    file_locks.hold(lock, "a reader")
    waited = []
    monkeypatch.setattr(manifest_index.time, "sleep", lambda _: waited.append(1) or lock.close())  # it is killed
    with listening(lambda: waited.append(2)):
        assert list_images(tmp_path).source_name(76)
    assert waited[:2] == [1, 2]
    assert len(scans) == 1
    assert place.is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-3]),
        lambda file: file.write_bytes(file.read_bytes().replace(b'"bytes"', b'"bites"')),
        lambda file: file.write_bytes(file.read_bytes().replace(b"rows/1", b"rows/9")),
    ],
    ids=["gone", "empty", "cut", "altered", "of another version"],
)
def test_a_missing_or_damaged_index_is_written_again(tmp_path, scans, damage):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    before = facts(tmp_path)
    damage(index_file(str(tmp_path / NAME)))
    assert facts(tmp_path) == before
    assert facts(tmp_path) == before
    assert len(scans) == 2
    beside = {index_file(str(tmp_path / NAME)).name, f".{NAME}.stamps"}
    assert {path.name for path in tmp_path.glob(".*")} == beside


def test_an_index_of_another_text_is_not_used(tmp_path, scans):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    text = (tmp_path / NAME).read_bytes()
    lines = text.split(b"\n")
    lines[5], lines[6] = lines[6], lines[5]  # as long, and with both ends as before
    (tmp_path / NAME).write_bytes(b"\n".join(lines))
    names = [list_images(tmp_path).source_name(row) for row in (3, 4)]
    assert [line.split(b"\t")[0].decode() for line in lines[5:7]] == names
    assert len(scans) == 2


def test_processes_that_open_a_manifest_together_read_it_once(tmp_path, scans):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    index_file(str(tmp_path / NAME)).unlink()
    scans.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(list_images(tmp_path).source_name(76))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert len(scans) == 1


def test_where_no_index_can_be_written_the_rows_are_read_and_a_line_says_so(tmp_path, capfd, monkeypatch):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    before = facts(tmp_path)
    index_file(str(tmp_path / NAME)).unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest_index, "_write", refuse)
    assert facts(tmp_path) == before
    said = capfd.readouterr().err
    assert f".{NAME}.rows: the index of {tmp_path / NAME} cannot be written (Permission denied" in said
    assert "each process reads all of its 77 rows at its start" in said


def test_its_own_index_is_no_change_of_the_folder(tmp_path, monkeypatch):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    os.utime(tmp_path / NAME)
    index_file(str(tmp_path / NAME)).unlink()
    list_images(tmp_path)  # writes it, which changes the folder's time
    assert tmp_path.stat().st_mtime_ns >= (tmp_path / NAME).stat().st_mtime_ns
    monkeypatch.setattr(changes, "_listed", lambda *_: pytest.fail("a folder was listed"))
    assert not list_images(tmp_path).source.left_out.counts


def test_a_source_passes_to_another_process_without_its_rows(tmp_path):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    source = open_source(tmp_path)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert [again.read(row) for row in range(77)] == [source.read(row) for row in range(77)]
    (tmp_path / NAME).write_text((tmp_path / NAME).read_text().replace("samples=77", "samples=78"))
    with pytest.raises(UserError, match="was replaced while it was in use"):
        pickle.loads(sent)


def test_an_open_manifest_stays_as_it_was_when_another_takes_its_place(tmp_path):
    made = write_classes(tmp_path, 77)
    write_index(tmp_path)
    images = list_images(tmp_path)
    (tmp_path / "cat/000.jpg").unlink()
    write_index(tmp_path)
    assert [images.source_name(row) for row in range(77)] == list(made)
    assert len(list_images(tmp_path)) == 76


@pytest.mark.parametrize("what", ["the manifest", "its index"])
def test_what_is_cut_while_it_is_read_is_named_in_one_line(tmp_path, what):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    images = list_images(tmp_path)
    os.truncate(tmp_path / NAME if what == "the manifest" else index_file(str(tmp_path / NAME)), 500)
    with pytest.raises(UserError, match=rf"^{tmp_path / NAME}: line 79 is not the row that was there") as told:
        images.read(76)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda text: text.replace("manifest/1", "manifest/2"),
            "of version 2, and this iwm-fast reads version 1",
        ),
        (lambda text: text[: len(text) // 2], "its last line has no end"),
        (lambda text: "".join(text.splitlines(keepends=True)[:40]), "it has 38 rows, and its first line says 77"),
        (lambda text: text.splitlines()[0], "it ends in its first lines"),
        (lambda text: text.splitlines(keepends=True)[0], "its line 2 does not begin with path"),
        (lambda text: text.replace("samples=77", "samples=-3"), "its first line says -3 samples"),
        (lambda text: text.replace("samples=77", "samples=many"), "many"),
        (lambda text: text + "cat\t1\n", "wrong number of columns"),
    ],
    ids=["another version", "half", "fewer rows", "no end", "one line", "negative", "no number", "a short row"],
)
def test_a_manifest_of_another_version_or_half_written_is_named_in_one_line(tmp_path, damage, said):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    (tmp_path / NAME).write_text(damage((tmp_path / NAME).read_text()))
    with pytest.raises(UserError, match="not a complete iwm-fast manifest") as told:
        list_images(tmp_path)
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_file_system_that_fails_is_waited_for_as_for_images(tmp_path, monkeypatch):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    images = list_images(tmp_path)

    def fail(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataGone, match=r"cannot be read \(Stale file handle\); bring the data back"):
        images.read(3)


def test_a_pipe_is_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(UserError, match="it is not a regular file"):
        list_images(tmp_path / "a.tsv")


def test_memory_of_an_open_manifest_does_not_grow_with_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_text, "_PIECE", 4096)
    write_classes(tmp_path, 2)
    write_index(tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    taken = {}
    for rows in (4_000, 20_000):  # both longer than what a stamp reads of either end
        manifest = tmp_path / f"{rows}.tsv"
        manifest.write_text(lines[0].replace("samples=2", f"samples={rows}") + lines[1] + lines[2] * rows)
        list_images(manifest)  # writes the index
        tracemalloc.start()
        images = list_images(manifest)
        identity_of(images)
        for row in range(0, rows, rows // 500):
            images.read(row)
        taken[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken[20_000] < taken[4_000] + 50_000  # a list of 16,000 numbers alone is 128,000 bytes


def test_of_many_folders_some_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_index, "LOOKED_AT", 3)
    write_classes(tmp_path, 4)
    for number in range(9):
        (tmp_path / f"f{number}").mkdir()
        (tmp_path / f"f{number}/a.jpg").write_bytes((tmp_path / "cat/000.jpg").read_bytes())
    write_index(tmp_path)
    source = open_source(tmp_path)
    assert not source.index.all_places
    assert len(source.index.places) == 3
    seen = source.index.places[1][0]
    (tmp_path / seen / "b.jpg").write_bytes(b"")
    when = (tmp_path / NAME).stat().st_mtime_ns + 60_000_000_000
    for folder in (tmp_path, tmp_path / seen):
        os.utime(folder, ns=(when, when))
    (count,) = open_source(tmp_path).left_out.counts.items()  # folders that were not looked at are not called new
    assert count == ("file(s) that came after their manifest: index again", 1)


def test_changed_folders_with_too_many_images_are_named_and_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_COMPARED", 3)
    write_classes(tmp_path, 12)
    write_index(tmp_path)
    when = (tmp_path / NAME).stat().st_mtime_ns + 60_000_000_000
    os.utime(tmp_path / "cat", ns=(when, when))
    source = open_source(tmp_path)
    assert source.left_out.counts == {UNCOMPARED: 1}
    assert source.left_out.examples == {UNCOMPARED: ["cat"]}


def test_a_part_of_a_checked_manifest_keeps_its_verdicts_however_many_bad_images_the_whole_has(tmp_path):
    write_classes(tmp_path, 12)
    for number in range(5):
        (tmp_path / f"cat/bad{number}.jpg").write_bytes(b"no image")
    write_index(tmp_path, check=True)
    images = list_images(tmp_path)
    assert images.unchecked == 5
    good = [row for row in range(len(images)) if "bad" not in images.source_name(row)][:4]
    known = KnownVerdicts(images.take(np.array(good)), 10**9)
    assert not len(known.unknown(np.arange(4)))


def test_verdicts_of_a_long_list_are_kept_for_the_last_files_and_are_always_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(known_verdicts, "SLOTS", 8)
    write_classes(tmp_path, 20)
    known = KnownVerdicts(ImageSet(open_source(tmp_path)), 10**9)
    for file in range(20):
        known[file] = (1, 1, file, 30, 4711)
    assert known.unknown(np.arange(20)).tolist() == list(range(12))
    assert [known[file][2] for file in range(12, 20)] == list(range(12, 20))
    known.use_pillow(13)
    assert known[13] == (2, 1, 13, 30, 4711)
    assert known[5] == (0, 0, 0, 0, 0)


def test_a_scan_of_many_chunks_finds_what_one_chunk_has(tmp_path, monkeypatch):
    write_classes(tmp_path, 77)
    write_index(tmp_path)
    text = manifest_text.ManifestText(open_source(tmp_path).storage, NAME)
    whole = manifest_scan.scan(text)
    for piece in (300, 1000, 4096):
        monkeypatch.setattr(manifest_text, "_PIECE", piece)
        part = manifest_scan.scan(text)
        np.testing.assert_array_equal(part.starts, whole.starts)
        assert (part.places, part.sums, part.unchecked) == (whole.places, whole.sums, whole.unchecked)
    assert [place[0] for place in whole.places] == sorted({Path(name).parent.name for name in names_of(tmp_path)})


def names_of(root):
    images = list_images(root)
    return [images.source_name(row) for row in range(len(images))]
