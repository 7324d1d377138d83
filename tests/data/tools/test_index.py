from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_images import encode, picture, turned
from made_sources import example, pack, write_classes, write_records
from PIL import Image

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources import storage
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.tools import index as index_module
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.known_rows import stamps_file
from iwm_fast.data.tools.manifest_files import writing_manifest
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError

NAME = "iwm-fast-manifest.tsv"


def rows(path):
    """Read the manifest like any reader of tab-separated text."""
    lines = path.read_text().splitlines()
    columns = lines[1].split("\t")
    return [dict(zip(columns, line.split("\t"), strict=True)) for line in lines[2:]]


def test_one_shard_s_manifest_leaves_that_of_its_folder(tmp_path):
    write_classes(tmp_path / "images", 4)
    write_shards(tmp_path / "images", tmp_path / "shards", shard_bytes=4000)
    write_index(tmp_path / "shards")
    whole = len(list_images(tmp_path / "shards"))
    shard = next((tmp_path / "shards").glob("*.tar"))
    alone = write_index(shard)
    assert alone["manifest"] == f"{shard}.tsv"
    assert len(list_images(tmp_path / "shards")) == whole > len(list_images(f"{shard}.tsv"))


def test_a_row_says_what_pillow_says_of_the_upright_image(tmp_path):
    made = write_classes(tmp_path, 6)
    made["dog/on its side.png"] = turned(picture(33, 21), 6, "PNG")
    made["dog/text.jpg"] = b"no image"
    made["dog/wide.webp"] = encode(picture(50, 20), "WEBP")
    for name in list(made)[6:]:
        (tmp_path / name).write_bytes(made[name])
    found = write_index(tmp_path)
    assert found == {
        "manifest": str(tmp_path / NAME),
        "source": "an image folder",
        "samples": 9,
        "classes": 2,
        "bytes": sum(map(len, made.values())),
        "unreadable": 1,
        "resumed": 0,
        "unchanged": 0,
        "left_out": [],
    }
    written = rows(tmp_path / NAME)
    assert [row["path"] for row in written] == sorted(made)
    crc = __import__("google_crc32c").value
    for row in written:
        raw = made[row["path"]]
        assert int(row["bytes"]) == len(raw)
        assert row["crc32c"] == f"{crc(raw):08x}"
        assert row["label"] == row["path"].split("/")[0]
    sizes = {row["path"]: (int(row["width"]), int(row["height"])) for row in written}
    assert sizes["dog/on its side.png"] == (21, 33)
    assert sizes["dog/wide.webp"] == (50, 20)
    assert sizes["dog/text.jpg"] == (0, 0)
    assert sizes["cat/000.jpg"] == Image.open(tmp_path / "cat/000.jpg").size


def test_from_a_manifest_nothing_is_listed(tmp_path, monkeypatch):
    made = write_classes(tmp_path, 7)
    before = list_images(tmp_path)
    write_index(tmp_path)
    monkeypatch.setattr(LocalStorage, "walk", lambda _: pytest.fail("the folder was listed"))
    monkeypatch.setattr(LocalStorage, "size", lambda *_: pytest.fail("a file was looked at"))
    after = list_images(tmp_path)
    assert [after.name(i) for i in range(7)] == [before.name(i) for i in range(7)]
    assert [after.read(i) for i in range(7)] == list(made.values())
    assert after.labels.tolist() == before.labels.tolist()
    assert (after.classes, after.source.kind) == (before.classes, "folder")
    assert "in the manifest" in after.source.describe()


@pytest.mark.usefixtures("settled")
def test_names_of_any_bytes_come_back_and_are_known_again(tmp_path):
    raw = encode(picture(40, 30))
    names = [
        "tab\there.jpg",
        "line\nhere.jpg",
        "back\\slash.jpg",
        "\\t.jpg",
        os.fsdecode(b"latin\xe9.jpg"),
        "größe.jpg",
    ]
    for name in names:
        (tmp_path / name).write_bytes(raw)
    write_index(tmp_path)
    images = list_images(tmp_path)
    assert sorted(images.name(i).removeprefix(f"{tmp_path}/") for i in range(len(images))) == sorted(names)
    assert all(images.read(i) == raw for i in range(len(images)))
    assert write_index(tmp_path)["unchanged"] == len(names)


def test_what_changed_or_vanished_is_a_bad_sample(tmp_path):
    made = write_classes(tmp_path, 5)
    write_index(tmp_path)
    names = list(made)
    (tmp_path / names[0]).write_bytes(made[names[0]] + b"x")
    (tmp_path / names[1]).write_bytes(made[names[1]][:-9] + b"123456789")
    (tmp_path / names[2]).unlink()
    images = list_images(tmp_path)
    for sample, reason in enumerate(["bytes, not", "its checksum differs", "No such file"]):
        with pytest.raises(BadSample, match=reason):
            images.read(sample)
    assert images.read(3) == made[names[3]]


def test_a_manifest_and_its_folder_can_move_together(tmp_path):
    made = write_classes(tmp_path / "a", 4)
    write_index(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert [list_images(tmp_path / "b").read(i) for i in range(4)] == list(made.values())
    assert list_images(tmp_path / "b" / NAME).name(0) == f"{tmp_path}/b/cat/000.jpg"


def test_a_manifest_elsewhere_leads_to_its_folder(tmp_path):
    made = write_classes(tmp_path / "a", 4)
    write_index(tmp_path / "a", tmp_path / "lists" / "mine.tsv")
    assert not (tmp_path / "a" / NAME).exists()
    assert [list_images(tmp_path / "lists" / "mine.tsv").read(i) for i in range(4)] == list(made.values())
    with pytest.raises(UserError, match=r"are of the kind folder, and data\.source is tfrecord"):
        list_images(tmp_path / "lists" / "mine.tsv", "tfrecord")


def test_a_damaged_record_is_in_the_manifest_and_bad(tmp_path):
    path = tmp_path / "a.tfrecord"
    offsets = write_records(path, [example(encode(picture(40, 30)), 1) for _ in range(3)])
    raw = bytearray(path.read_bytes())
    raw[offsets[1] + 100] ^= 1
    path.write_bytes(raw)
    assert write_index(tmp_path)["unreadable"] == 1
    images = list_images(tmp_path)
    assert len(images) == 3
    with pytest.raises(BadSample, match="unreadable when it was indexed"):
        images.read(1)
    assert images.read(2) == encode(picture(40, 30))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.rsplit("\n", 2)[0] + "\n",
        lambda text: text.replace("samples=", "samples=1"),
        lambda text: text.replace("\t", " ", 20),
        lambda text: text.replace("crc32c\t", "sha1\t"),
        lambda text: text.replace("cat/000.jpg\t1", "cat/000.jpg\tx"),
        lambda _: "",
        lambda text: text.replace("source=folder", "source=tape"),
    ],
    ids=["cut", "a row less", "another count", "no tabs", "other columns", "no number", "empty", "unknown source"],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, damage):
    write_classes(tmp_path, 4)
    write_index(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert damage(text) != text
    (tmp_path / NAME).write_text(damage(text))
    with pytest.raises(UserError, match="not a complete iwm-fast manifest") as caught:
        list_images(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / NAME))


@pytest.fixture
def settled(monkeypatch):
    """Files that were just written are taken for settled; real ones are after two seconds."""
    monkeypatch.setattr(storage, "SETTLED_NS", 0)


@pytest.fixture
def read(monkeypatch):
    """The names of the images that were read."""
    found = []
    row = index_module._row

    def noted(images, sample, **named):
        found.append(images.name(sample))
        return row(images, sample, **named)

    monkeypatch.setattr(index_module, "_row", noted)
    return found


def leave(root, name, text, stamps):
    """Leave what a killed run leaves."""
    (root / f".{name}.partial").write_bytes(text)
    (root / f".{name}.partial.stamps").write_bytes(stamps)


@pytest.mark.usefixtures("settled")
def test_indexing_resumes_after_the_whole_rows_of_a_killed_run(tmp_path, read):
    write_classes(tmp_path, 40)
    write_index(tmp_path, tmp_path / "straight.tsv")
    whole, stamps = (tmp_path / "straight.tsv").read_bytes(), stamps_file(tmp_path / "straight.tsv").read_bytes()
    for cut in (0, 10, 70, len(whole) // 2, len(whole) - 3, len(whole)):
        leave(tmp_path, "again.tsv", whole[:cut], stamps)
        read.clear()
        found = write_index(tmp_path, tmp_path / "again.tsv")
        assert (tmp_path / "again.tsv").read_bytes() == whole
        assert stamps_file(tmp_path / "again.tsv").read_bytes() == stamps
        assert found["resumed"] == max(0, whole[:cut].count(b"\n") - 2) == 40 - len(read)
        assert found["bytes"] == sum(int(row["bytes"]) for row in rows(tmp_path / "again.tsv"))
        assert not list(tmp_path.glob(".*.partial*"))
        (tmp_path / "again.tsv").unlink()
    leave(tmp_path, "again.tsv", whole, stamps[: 8 * 13 + 5])  # whose stamps were cut
    assert write_index(tmp_path, tmp_path / "again.tsv")["resumed"] == 13


@pytest.mark.usefixtures("settled")
def test_rows_of_a_killed_run_are_kept_where_the_listing_changed_and_not_where_the_file_did(tmp_path, read):
    made = write_classes(tmp_path, 10)
    write_index(tmp_path, tmp_path / "a.tsv")
    leave(tmp_path, "b.tsv", (tmp_path / "a.tsv").read_bytes(), stamps_file(tmp_path / "a.tsv").read_bytes())
    (tmp_path / "cat/000.jpg").rename(tmp_path / "cat/999.jpg")
    (tmp_path / "cat/000a.jpg").write_bytes(made["cat/000.jpg"])
    (tmp_path / "dog/005.jpg").write_bytes(made["cat/000.jpg"])
    read.clear()
    found = write_index(tmp_path, tmp_path / "b.tsv")
    assert read == ["cat/000a.jpg", "cat/999.jpg", "dog/005.jpg"]
    assert (found["resumed"], found["samples"]) == (8, 11)
    (tmp_path / "a.tsv").unlink()
    write_index(tmp_path, tmp_path / "a.tsv")
    assert (tmp_path / "b.tsv").read_bytes() == (tmp_path / "a.tsv").read_bytes()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", ["folder", "webdataset", "tfrecord"])
def test_an_unchanged_image_is_not_read_again_and_a_changed_one_is_inspected_again(tmp_path, read, kind):
    write_classes(tmp_path / "images", 40)
    root = pack(tmp_path / "images", tmp_path / "packed", kind)
    first = write_index(root, check=True)
    assert first["checked"] == {"plain": 40, "pillow": 0, "bad": 0}
    before = (root / NAME).read_bytes()
    read.clear()
    again = write_index(root, check=True)
    assert read == []
    assert again == first | {"unchanged": 40}
    assert (root / NAME).read_bytes() == before
    at = before.split(b"\n")[9].split(b"\t")
    file, start = root / (at[6] or at[0]).decode(), int(at[7] or 0)
    raw = bytearray(file.read_bytes())
    raw[start : start + 20] = bytes(20)  # no JPEG any more, and as long as before
    file.write_bytes(raw)
    third = write_index(root, check=True)
    same_piece = sum(line.split(b"\t")[6] == at[6] for line in before.split(b"\n")[2:-1]) if at[6] else 1
    assert len(read) == same_piece == 40 - third["unchanged"]
    assert third["checked"] == {"plain": 39, "pillow": 0, "bad": 1}
    assert [row["check"] for row in rows(root / NAME)].count("0") == 1


@pytest.mark.usefixtures("settled")
def test_a_check_reads_what_was_indexed_without_one_and_keeps_what_was_checked(tmp_path, read):
    write_classes(tmp_path, 9)
    write_index(tmp_path)
    plain = (tmp_path / NAME).read_bytes()
    assert write_index(tmp_path, check=True)["unchanged"] == 0
    assert len(read) == 18
    checked = (tmp_path / NAME).read_bytes()
    assert write_index(tmp_path, check=True)["unchanged"] == 9
    assert (tmp_path / NAME).read_bytes() == checked
    assert write_index(tmp_path)["unchanged"] == 9
    assert (tmp_path / NAME).read_bytes() == plain
    assert len(read) == 18


@pytest.mark.usefixtures("settled")
def test_a_label_that_changed_is_written_though_the_image_is_not_read_again(tmp_path, read):
    made = write_classes(tmp_path, 6)
    for name in [name for name in made if name.startswith("dog")]:
        (tmp_path / name).rename(tmp_path / name.replace("dog", "cat"))
    (tmp_path / "dog").rmdir()
    write_index(tmp_path)
    assert {row["label"] for row in rows(tmp_path / NAME)} == {""}  # one folder is no class
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow/1.jpg").write_bytes(made["cat/000.jpg"])
    read.clear()
    assert write_index(tmp_path)["unchanged"] == 6
    assert read == ["cow/1.jpg"]
    assert [row["label"] for row in rows(tmp_path / NAME)] == ["cat"] * 6 + ["cow"]


def test_a_file_that_changed_within_the_last_seconds_is_read_again(tmp_path, read):
    write_classes(tmp_path, 5)
    write_index(tmp_path)
    read.clear()
    assert write_index(tmp_path)["unchanged"] == 0
    assert len(read) == 5


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("of_text", "of_stamps"),
    [
        (None, lambda stamps: stamps[:20]),
        (None, lambda stamps: stamps[8:] + stamps[:8]),
        (None, lambda _: b""),
        (lambda text: text.replace(b"cat/002.jpg\t", b"cat/002.jpg\t1"), None),
        (lambda text: text.replace(b"manifest/1", b"manifest/9"), None),
        (lambda text: text[: len(text) // 2], None),
        (lambda _: b"\0\xff" * 300, None),
    ],
    ids=["cut", "shifted", "empty", "altered row", "other version", "half a manifest", "no text"],
)
def test_a_damaged_manifest_or_stamps_file_vouches_for_no_wrong_row(tmp_path, of_text, of_stamps):
    write_classes(tmp_path, 12)
    write_index(tmp_path, check=True)
    whole = (tmp_path / NAME).read_bytes()
    for file, damage in ((tmp_path / NAME, of_text), (stamps_file(tmp_path / NAME), of_stamps)):
        if damage is not None:
            file.write_bytes(damage(file.read_bytes()))
    assert write_index(tmp_path, check=True)["unchanged"] < 12
    assert (tmp_path / NAME).read_bytes() == whole


@pytest.mark.usefixtures("settled")
def test_runs_killed_one_after_the_other_lose_no_row(tmp_path, read, monkeypatch):
    """Each is killed after some rows, while the folder grows at its beginning."""
    monkeypatch.setattr(index_module, "_SPAN", 5)
    made = write_classes(tmp_path, 60)
    raw = made["cat/000.jpg"]
    row = index_module._row
    for turn in range(4):
        for number in range(7):
            (tmp_path / f"cat/-{9 - turn}{number}.jpg").write_bytes(raw)
        left = 18

        def killed(images, sample, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return row(images, sample, **named)

        monkeypatch.setattr(index_module, "_row", killed)
        with pytest.raises(KeyboardInterrupt):
            write_index(tmp_path)
        assert not (tmp_path / NAME).exists()
    monkeypatch.setattr(index_module, "_row", row)
    before = len(read)
    found = write_index(tmp_path)
    assert found["samples"] == 60 + 4 * 7
    assert found["resumed"] == 88 - (len(read) - before)
    assert len(read) - len(set(read)) <= 4 * 4  # the part of five that a kill interrupts
    assert not list(tmp_path.glob(".*.partial*"))
    assert [line["path"] for line in rows(tmp_path / NAME)] == sorted(line["path"] for line in rows(tmp_path / NAME))


def test_killed_at_any_moment_it_leaves_no_manifest_and_resumes(tmp_path, monkeypatch):
    """SIGKILL while rows are written; with two processes, which end by themselves."""
    images = tmp_path / "many"
    images.mkdir()
    raw = encode(picture(40, 30))
    for number in range(600):
        (images / f"{number:05d}.jpg").write_bytes(raw)
    script = tmp_path / "index.py"
    # code outside the condition also runs in the worker processes
    script.write_text(
        "import time\n"
        "from iwm_fast.data.sources import storage\n"
        "from iwm_fast.data.tools import index\n"
        "storage.SETTLED_NS = 0\n"
        "index._WORTH_PROCESSES, index._SPAN, row = 10, 10, index._row\n"
        "made = []\n"
        "def late(*given, **named):\n"
        "    made.append(time.sleep(0.1 if len(made) > 100 else 0.0))\n"
        "    return row(*given, **named)\n"
        "index._row = late\n"
        f"if __name__ == '__main__': index.write_index({str(images)!r}, processes=2)\n"
    )
    child = subprocess.Popen([sys.executable, script], start_new_session=True)
    partial = images / f".{NAME}.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 5_000) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (images / NAME).exists()
    deadline = time.monotonic() + 120
    while _in_session(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _in_session(child.pid)
    monkeypatch.setattr(storage, "SETTLED_NS", 0)  # a quick machine gets here within two seconds
    found = write_index(images)
    assert 0 < found["resumed"] < 600
    assert [row["path"] for row in rows(images / NAME)] == [f"{number:05d}.jpg" for number in range(600)]


def _in_session(session):
    """Return the processes of a session that still run."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(stat.parent.name)
    return alive


def test_two_commands_do_not_write_one_manifest(tmp_path):
    write_classes(tmp_path, 3)
    with writing_manifest(tmp_path / NAME), pytest.raises(UserError, match="another process is writing it"):
        write_index(tmp_path)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    write_classes(tmp_path, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_index(tmp_path, tmp_path / "file" / "a.tsv")
    with pytest.raises(UserError, match=r"a manifest's name ends in \.tsv"):
        write_index(tmp_path, tmp_path / "a.json")


@pytest.mark.parametrize("beside", [f".{NAME}.partial", f".{NAME}.stamps"])
def test_a_folder_in_the_place_of_a_file_beside_the_manifest_is_named(tmp_path, beside):
    write_classes(tmp_path, 2)
    (tmp_path / beside).mkdir()
    with pytest.raises(UserError, match=rf"{NAME}: cannot be written: .*{beside}: Is a directory") as told:
        write_index(tmp_path)
    assert "\n" not in str(told.value)


def test_json_names_the_schema(tmp_path, capsys):
    from iwm_fast.cli.main import main

    write_classes(tmp_path, 2)
    assert main(["data", "index", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["samples"]) == ("iwm-fast-data-index/1", 2)


def later(*paths):
    """Make it look changed a minute after the manifest was written."""
    for path in paths:
        when = path.stat().st_mtime_ns + 60_000_000_000
        os.utime(path, ns=(when, when))


def counts(root):
    return list_images(root).source.left_out.counts


def test_what_came_or_went_since_is_counted_when_a_manifest_is_opened(tmp_path, capfd):
    made = write_classes(tmp_path, 8)
    write_index(tmp_path)
    assert not counts(tmp_path)
    (tmp_path / "cat" / "more.jpg").write_bytes(made["cat/000.jpg"])
    (tmp_path / "cat" / "notes.txt").write_text("a text")
    (tmp_path / "cat" / "000.jpg").unlink()
    (tmp_path / "cow" / "deep").mkdir(parents=True)
    (tmp_path / "cow" / "deep" / "1.jpg").write_bytes(made["cat/000.jpg"])
    (tmp_path / "cat" / "loop").symlink_to("..")
    later(tmp_path, tmp_path / "cat")
    assert counts(tmp_path) == {
        "file(s) that came after their manifest: index again": 2,
        "file(s) of the manifest that are gone: index again": 1,
    }
    assert "(cat/more.jpg, cow/deep/1.jpg)" in capfd.readouterr().err
    write_index(tmp_path)
    later(tmp_path, tmp_path / "cat")
    assert not counts(tmp_path)


def test_shards_that_changed_or_came_since_are_counted(tmp_path):
    write_classes(tmp_path / "images", 8)
    from iwm_fast.data.tools.shard import write_shards

    write_shards(tmp_path / "images", tmp_path / "out", shard_bytes=10_000)
    write_index(tmp_path / "out")
    assert not counts(tmp_path / "out")
    shard = tmp_path / "out" / "shard-000000.tar"
    (tmp_path / "out" / "more.tar").write_bytes(shard.read_bytes())
    later(tmp_path / "out", shard)
    assert counts(tmp_path / "out") == {
        "file(s) that came after their manifest: index again": 1,
        "file(s) that changed after their manifest was written: index again": 1,
    }


def test_a_manifest_elsewhere_sees_what_came_since(tmp_path):
    made = write_classes(tmp_path / "a", 4)
    write_index(tmp_path / "a", tmp_path / "mine.tsv")
    (tmp_path / "a" / "dog" / "more.jpg").write_bytes(made["cat/000.jpg"])
    later(tmp_path / "a" / "dog")
    assert list(counts(tmp_path / "mine.tsv").values()) == [1]
