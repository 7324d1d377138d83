"""A data set is its list of names and sizes: its location, and what lists it, make no difference."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from made_images import encode, picture
from made_sources import write_classes
from made_triplets import write_game

from iwm_fast.data.identity import difference, identity_of, names_digest, read_identity
from iwm_fast.data.image_list import list_images
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.triplets import read_triplets

COUNT = 13


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path / "here" / "images", COUNT)
    return tmp_path / "here" / "images"


@pytest.mark.parametrize("how", ["copied", "moved", "linked", "slash", "indexed", "listed by a manifest elsewhere"])
def test_the_same_files_are_the_same_data(folder, tmp_path, how):
    before = identity_of(list_images(folder))
    place = tmp_path / "there"
    if how == "copied":
        shutil.copytree(folder, place)
    elif how == "moved":
        folder.rename(place)
    elif how == "linked":
        place.symlink_to(folder)
    elif how == "slash":
        place = f"{os.path.relpath(folder)}/./"
    elif how == "indexed":
        write_index(folder)
        place = folder
    else:
        place = tmp_path / "list.tsv"
        write_index(folder, place)
    images = list_images(place)
    assert identity_of(images) == before
    assert difference(before, identity_of(images), images) is None
    assert before.samples == COUNT
    assert before.bytes == sum(path.stat().st_size for path in folder.rglob("*.*")) or how in {"moved", "indexed"}


def test_shards_are_the_same_data_where_they_are_copied_and_other_data_than_the_files_in_them(folder, tmp_path):
    write_shards(folder, tmp_path / "a", shard_bytes=30_000)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = (identity_of(list_images(tmp_path / name)) for name in "ab")
    assert one == other
    assert one.digest != identity_of(list_images(folder)).digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("add", f"{COUNT + 1} samples, {COUNT} before"),
        ("remove", f"{COUNT - 1} samples, {COUNT} before"),
        ("rename", "other names, first at "),
        ("resize", "other sizes, first at "),
    ],
)
def test_what_differs_is_told_in_words(folder, change, words):
    before = identity_of(list_images(folder))
    victim = sorted(folder.rglob("*.*"))[4]
    if change == "add":
        (victim.parent / "zz.jpg").write_bytes(encode(picture(40, 30, 99)))
    elif change == "remove":
        victim.unlink()
    elif change == "rename":
        victim = victim.rename(victim.with_name(f"{victim.stem}x{victim.suffix}"))
    else:
        victim.write_bytes(victim.read_bytes() + b"\0")
    images = list_images(folder)
    said = difference(before, identity_of(images), images)
    assert said.startswith(words)
    if "first" in words:
        assert said.endswith(str(victim.relative_to(folder)))


def test_of_a_long_list_the_part_that_differs_is_named(tmp_path):
    for number in range(513):
        (tmp_path / f"{number:04d}.jpg").write_bytes(b"x")
    before = identity_of(list_images(tmp_path))
    (tmp_path / "0377.jpg").write_bytes(b"xx")
    images = list_images(tmp_path)
    now = identity_of(images)
    assert now.part == 3
    assert difference(before, now, images) == "other sizes, first from 0375.jpg to 0377.jpg"
    assert len(json.dumps(now.document())) < 8000


def test_triplets_are_their_pictures_and_rows(tmp_path):
    manifest = write_game(tmp_path / "a")
    before = identity_of(read_triplets(manifest))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = read_triplets(tmp_path / "b" / "manifest.jsonl")
    assert identity_of(moved) == before
    assert before.samples == len(moved)
    lines = (tmp_path / "b" / "manifest.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps(row | {"action": [0.0, 0.0]})
    (tmp_path / "b" / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    other = read_triplets(tmp_path / "b" / "manifest.jsonl")
    assert difference(before, identity_of(other), other) == "other pictures or actions in the manifest's rows"


def test_an_identity_goes_through_json_and_anything_else_is_none(folder):
    identity = identity_of(list_images(folder))
    document = json.loads(json.dumps(identity.document()))
    assert read_identity(document) == identity
    for other in (None, [], {}, {"schema": 1}, document | {"names": 3}, document | {"samples": "x"}, {"schema": 2}):
        assert read_identity(other) is None


def test_ranks_compare_names_without_looking_at_files(folder, monkeypatch):
    images = list_images(folder)
    before = names_digest(images)
    shutil.rmtree(folder)
    assert names_digest(images) == before
    assert before[0] == COUNT


def test_shards_that_went_came_or_changed_are_named(folder, tmp_path):
    before = identity_of(list_images(folder))
    assert before.shards is None
    parts = dict.fromkeys(("a.tar", "b.tar", "c.tar", "d.tar"), 3)
    old = replace(before, digest="old", shards=parts)
    now = replace(before, digest="new", shards={"a.tar": 3, "c.tar": 4, "e.tar": 3})
    said = "2 shards gone (b.tar, d.tar); 1 shard new (e.tar); 1 shard with another number of samples (c.tar)"
    images = list_images(folder)
    assert difference(old, now, images) == said
    assert difference(old, replace(now, samples=10), images) == f"10 samples, {COUNT} before: {said}"
    unknown = replace(old, samples=9, shards=None)  # of an older version
    assert difference(unknown, now, images) == f"{COUNT} samples, 9 before"
    assert read_identity(old.document()) == old
    assert read_identity({key: value for key, value in old.document().items() if key != "shards"}).shards is None
