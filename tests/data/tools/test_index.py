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
from made_sources import example, write_classes, write_records
from PIL import Image

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import list_images
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.tools import index as index_module
from iwm_fast.data.tools.index import write_index
from iwm_fast.errors import UserError

NAME = "iwm-fast-manifest.tsv"


def rows(path):
    """Read the manifest like any reader of tab-separated text."""
    lines = path.read_text().splitlines()
    columns = lines[1].split("\t")
    return [dict(zip(columns, line.split("\t"), strict=True)) for line in lines[2:]]


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
    monkeypatch.setattr(LocalStorage, "names", lambda _: pytest.fail("the folder was listed"))
    monkeypatch.setattr(LocalStorage, "size", lambda *_: pytest.fail("a file was looked at"))
    after = list_images(tmp_path)
    assert [after.name(i) for i in range(7)] == [before.name(i) for i in range(7)]
    assert [after.read(i) for i in range(7)] == list(made.values())
    assert after.labels.tolist() == before.labels.tolist()
    assert (after.classes, after.source.kind) == (before.classes, "folder")
    assert "in the manifest" in after.source.describe()


def test_names_of_any_bytes_come_back(tmp_path):
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


def test_indexing_resumes_after_the_whole_rows_of_a_killed_run(tmp_path, monkeypatch):
    write_classes(tmp_path, 40)
    write_index(tmp_path, tmp_path / "straight.tsv")
    whole = (tmp_path / "straight.tsv").read_bytes()
    read = []
    measure = index_module._row
    monkeypatch.setattr(index_module, "_row", lambda images, i, **named: read.append(i) or measure(images, i, **named))
    for cut in (0, 10, 70, len(whole) // 2, len(whole) - 3, len(whole)):
        (tmp_path / ".again.tsv.partial").write_bytes(whole[:cut])
        read.clear()
        found = write_index(tmp_path, tmp_path / "again.tsv")
        assert (tmp_path / "again.tsv").read_bytes() == whole
        assert found["resumed"] == max(0, whole[:cut].count(b"\n") - 2) == 40 - len(read)
        assert found["bytes"] == sum(int(row["bytes"]) for row in rows(tmp_path / "again.tsv"))
    assert not list(tmp_path.glob(".*.partial"))


def test_rows_of_another_listing_are_not_kept(tmp_path):
    write_classes(tmp_path, 10)
    write_index(tmp_path, tmp_path / "a.tsv")
    (tmp_path / "a.tsv").rename(tmp_path / ".b.tsv.partial")
    (tmp_path / "cat/000.jpg").rename(tmp_path / "cat/999.jpg")
    assert write_index(tmp_path, tmp_path / "b.tsv")["resumed"] == 0
    assert list_images(tmp_path / "b.tsv").name(0) == f"{tmp_path}/cat/002.jpg"


def test_killed_at_any_moment_it_leaves_no_manifest_and_resumes(tmp_path):
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
        "from iwm_fast.data.tools import index\n"
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
    with index_module._beside(tmp_path / NAME), pytest.raises(UserError, match="another process is writing it"):
        write_index(tmp_path)


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    write_classes(tmp_path, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_index(tmp_path, tmp_path / "file" / "a.tsv")
    with pytest.raises(UserError, match=r"a manifest's name ends in \.tsv"):
        write_index(tmp_path, tmp_path / "a.json")


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
