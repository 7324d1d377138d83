from __future__ import annotations

import json
import tarfile

import pytest
from made_images import encode, picture
from made_sources import write_classes

from iwm_fast.cli.options import byte_count
from iwm_fast.data.image_list import list_images
from iwm_fast.data.tools import shard as shards_module
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.errors import UserError


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "images", 40)
    return tmp_path / "images"


def test_the_same_images_give_the_same_bytes(folder, tmp_path):
    first = write_shards(folder, tmp_path / "a", shard_bytes=30_000)
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "again")
    (tmp_path / "moved" / "again" / "cat" / "000.jpg").touch()
    second = write_shards(tmp_path / "moved" / "again", tmp_path / "b", shard_bytes=30_000)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert {**first, "out": None} == {**second, "out": None}
    assert first["shards"] == len(list((tmp_path / "a").glob("*.tar"))) > 3
    assert first["samples"] == 40


def test_shards_are_plain_tar_files_of_about_the_requested_size(folder, tmp_path):
    write_shards(folder, tmp_path / "out", shard_bytes=30_000)
    for path in sorted((tmp_path / "out").glob("*.tar")):
        assert path.stat().st_size <= 30_000 + tarfile.RECORDSIZE
        with tarfile.open(path) as archive:
            for entry in archive:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) == (0, 0, 0, "", 0o644)
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    said = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert (said["schema"], said["samples"], said["classes"]) == ("iwm-fast-shards/1", 40, 2)


def test_our_index_is_wds2idx_s(folder, tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    write_shards(folder, tmp_path / "out", shard_bytes=30_000)
    for path in (tmp_path / "out").glob("*.tar"):
        with wds2idx.IndexCreator(str(path), str(tmp_path / "its.idx"), verbose=False) as creator:
            creator.create_index()
        assert path.with_suffix(".idx").read_bytes() == (tmp_path / "its.idx").read_bytes()


def test_names_become_keys_that_stay_apart(tmp_path):
    root = tmp_path / "images"
    names = ["a.jpg", "a.png", "a.b.jpg", "a b.jpg", "ü/1.jpg", "A.JPG", f"{'deep/' * 30}1.jpg", "x" * 200 + ".jpg"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture(30, 20, number)))
    write_shards(root, tmp_path / "out")
    here, there = list_images(root), list_images(tmp_path / "out")
    assert [there.read(i) for i in range(len(there))] == [here.read(i) for i in range(len(here))]
    members = [there.name(i).split(":", 1)[1] for i in range(len(there))]
    assert len({member.split("/")[-1].split(".")[0] + member.rpartition("/")[0] for member in members}) == len(names)
    assert all(len(member) <= 100 and " " not in member and member.isascii() for member in members)
    assert {"a.jpg", "a%2Epng.png", "a%2Eb.jpg", "a%20b.jpg", "A.jpg"} <= set(members)


def test_packing_resumes_at_the_first_missing_shard(folder, tmp_path, monkeypatch):
    write_shards(folder, tmp_path / "whole", shard_bytes=30_000)
    write, left = shards_module._write_shard, [3]

    def stop(*given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(*given)

    with monkeypatch.context() as stopped:
        stopped.setattr(shards_module, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            write_shards(folder, tmp_path / "parts", shard_bytes=30_000)
    assert not (tmp_path / "parts" / "shards.json").exists()
    (tmp_path / "parts" / "shard-000001.idx").unlink()  # killed between a shard and its index
    (tmp_path / "parts" / ".shard-000003.tar.partial").write_bytes(b"half")
    assert write_shards(folder, tmp_path / "parts", shard_bytes=30_000)["resumed"] == 2
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_other_images_or_another_size_are_refused(folder, tmp_path):
    write_shards(folder, tmp_path / "out", shard_bytes=30_000)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match="has shards of other images or another size"):
        write_shards(folder, tmp_path / "out", shard_bytes=40_000)
    (folder / "cat" / "more.jpg").write_bytes(encode(picture(20, 20)))
    with pytest.raises(UserError, match="has shards of other images or another size"):
        write_shards(folder, tmp_path / "out", shard_bytes=30_000)
    assert files(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="has other files"):
        write_shards(folder, tmp_path / "mine")


def test_a_file_that_changes_meanwhile_is_named_and_leaves_no_shard(folder, tmp_path, monkeypatch):
    divide = shards_module._divide

    def change(*given):
        (folder / "cat" / "002.jpg").write_bytes(b"shorter")
        return divide(*given)

    monkeypatch.setattr(shards_module, "_divide", change)
    with pytest.raises(UserError, match=r"cat/002\.jpg: it changed from \d+ to 7 bytes while packing"):
        write_shards(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*.tar"))


def test_sizes_are_written_as_people_write_them():
    assert [byte_count(text) for text in ("1000000", "512KB", "256MB", "1.5G", "2 gib")] == [
        1_000_000,
        512 * 1024,
        256 * 1024**2,
        3 * 512 * 1024**2,
        2 * 1024**3,
    ]
    for wrong in ("", "MB", "-1", "0", "1PB", "1,5GB"):
        with pytest.raises(UserError, match="not a size"):
            byte_count(wrong)


def test_the_command_packs_and_says_so(folder, tmp_path, command):
    words = ["data", "shard", folder, "--out", tmp_path / "out", "--shard-size", "30KB", "--json"]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["schema"], said["samples"], said["classes"]) == ("iwm-fast-data-shard/1", 40, 2)
    assert "pack: 40 of 40" in done.stderr


def test_shards_of_unlabelled_images_have_no_classes(tmp_path):
    """Their names hold the shard's, which a reader would take for a class."""
    write_classes(tmp_path / "images", 4)
    for folder in (tmp_path / "images").iterdir():
        for path in folder.iterdir():
            path.rename(tmp_path / "images" / f"{folder.name}_{path.name}")
        folder.rmdir()
    write_shards(tmp_path / "images", tmp_path / "first", shard_bytes=4000)
    write_shards(tmp_path / "first", tmp_path / "second")
    assert len(list((tmp_path / "first").glob("*.tar"))) > 1
    found = list_images(tmp_path / "second")
    assert (len(found), found.classes) == (len(list_images(tmp_path / "images")), ())
