"""Shards read in their order: the same samples as one by one, few requests, and one line for each fault."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import write_images
from made_sources import example, write_classes, write_records
from made_triplets import write_game
from small_run import small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.data import samples as samples_module
from iwm_fast.data import shard_reads
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.shard_order import ShardOrder, require_streams
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.tools.index import write_index
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.triplets import resolve_triplets
from iwm_fast.errors import UserError

FILES, STREAMS, BATCH = 50, 12, 24


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Write the same images in shards with an index, without one, in TFRecord files, and in a manifest of shards."""
    home = tmp_path_factory.mktemp("shards")
    write_images(home / "images", FILES)
    write_shards(home / "images", home / "indexed", shard_bytes=10_000)
    for name in ("walked", "listed"):
        shutil.copytree(home / "indexed", home / name)
    for index in (home / "walked").glob("*.idx"):
        index.unlink()
    write_index(home / "listed")
    (home / "records").mkdir()
    images = list_images(home / "images")
    for first in range(0, FILES, 4):
        payloads = [example(images.read(row), 1) for row in range(first, min(first + 4, FILES))]
        write_records(home / "records" / f"{first:03d}.tfrecord", payloads)
    return home


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)


def stream_of(root, *, world=1, rank=0, start=0, run_dir=None, **changes):
    keys = {"data__order": "shard", "data__streams": STREAMS, "data__shuffle_window": 3, "train__global_batch": BATCH}
    config = small_config(root, **(keys | changes))
    space = ActionSpace(config.actions.groups)
    return TrainingStream(config, list_images(root), space, rank=rank, world=world, start=start, run_dir=run_dir)


def batches(root, steps, *, world=1, start=0, **options):
    """Return the samples of global batches in the order of their positions: (epoch, id, pixels, action, masks)."""
    ranks = [stream_of(root, world=world, rank=rank, start=start, **options) for rank in range(world)]
    found = []
    for _ in range(steps):
        shares = []
        for stream in ranks:
            rows = []
            for _ in range(stream.accumulation):
                batch = next(stream)
                masks = (batch.patches.context_lengths.tolist(), batch.global_context, batch.global_target)
                pixels = [batch.source[row].numpy().tobytes() for row in range(len(batch))]
                rows += zip(batch.epochs.tolist(), batch.ids.tolist(), pixels, masks[0], strict=True)
            shares.append([(*row, *masks[1:]) for row in rows])
        found.append([row for rows in zip(*shares, strict=True) for row in rows])
    for stream in ranks:
        stream.close()
    return found


@pytest.fixture(scope="module")
def whole(places):
    return batches(places / "indexed", 5)


def test_two_epochs_have_every_sample_twice(whole):
    seen = Counter(row[:2] for batch in whole for row in batch)
    assert {pair: times for pair, times in seen.items() if pair[0] < 2} == {
        (e, i): 1 for e in (0, 1) for i in range(FILES)
    }


def test_a_run_on_two_ranks_goes_on_alone_and_on_three(places, whole):
    parts = [(2, 0, 2), (1, 2, 1), (3, 3, 2)]
    found = [
        batch
        for world, step, steps in parts
        for batch in batches(places / "indexed", steps, world=world, start=step * BATCH)
    ]
    assert found == whole


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("walked", {}),
        ("listed", {}),
        ("indexed", {"world": 2, "train__micro_batch": 4}),
    ],
    ids=["without an index", "a manifest", "accumulation on two ranks"],
)
def test_samples_do_not_depend_on_how_they_are_read(places, whole, place, options):
    assert batches(places / place, 5, **options) == whole


def test_images_are_those_of_the_order_of_samples(places, whole):
    plain = {row[:2]: row[2:4] for batch in batches(places / "images", 5, data__order="sample") for row in batch}
    for found in (whole, batches(places / "records", 5)):  # other shards, so another order
        mine = {row[:2]: row[2:4] for batch in found for row in batch}
        both = plain.keys() & mine.keys()
        assert len(both) > 100
        assert {pair: plain[pair] for pair in both} == {pair: mine[pair] for pair in both}


class Reads:
    """Records (file, offset, bytes) of every read below a folder, and calls `act` before the n-th."""

    def __init__(self, monkeypatch, act=None, at=0):
        self.seen, self.lock = [], threading.Lock()
        plain = LocalStorage.read

        def read(storage, name, offset=0, length=None):
            with self.lock:
                if act is not None and len(self.seen) == at:
                    act()
                raw = plain(storage, name, offset, length)
                self.seen.append((name, offset, len(raw)))
            return raw

        monkeypatch.setattr(LocalStorage, "read", read)


def packed(tmp_path, count, shard_bytes):
    write_images(tmp_path / "images", count)
    write_shards(tmp_path / "images", tmp_path / "packed", shard_bytes=shard_bytes)
    return tmp_path / "packed"


def test_shards_are_read_from_front_to_back_by_few_requests(tmp_path, monkeypatch):
    root = packed(tmp_path, 120, 30_000)
    shards = list_images(root).source.shards()
    assert 8 < len(shards) < 30
    stream = stream_of(root, data__streams=4, data__shuffle_window=20, train__global_batch=8)
    reads = Reads(monkeypatch)
    for _ in range(15):
        next(stream)
    stream.close()
    images = list_images(root)
    used = sum(images.source.size(row) for row in range(120))
    epoch, at = [], 0  # the second one has begun as well
    while sum(length for _, _, length in epoch) < used:
        epoch.append(reads.seen[at])
        at += 1
    assert len(epoch) < 120 / 3  # one per window of up to 20 and shard of about 8
    assert sum(length for _, _, length in epoch) < 1.35 * used  # tar's headers and padding beside images of 2 KB
    for name in shards:
        spans = sorted((offset, offset + length) for file, offset, length in epoch if file == name)
        assert all(one[1] <= other[0] + 1024 for one, other in itertools.pairwise(spans))


def test_a_large_window_is_read_in_ranges_of_a_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_reads, "LONGEST", 6_000)
    root = packed(tmp_path, 60, 10**9 // 1000)
    stream = stream_of(root, data__streams=1, data__shuffle_window=30, train__global_batch=6)
    reads = Reads(monkeypatch)
    seen = [tuple(next(stream).ids.tolist()) for _ in range(10)]
    stream.close()
    assert len({sample for ids in seen for sample in ids}) == 60
    assert max(length for _, _, length in reads.seen) <= 6_000
    assert len(reads.seen) > 10


def test_a_rank_holds_a_window_and_a_quarter_of_each_stream(tmp_path):
    root = packed(tmp_path, 80, 20_000)
    stream = stream_of(root, data__streams=2, data__shuffle_window=16, train__global_batch=4, data__prefetch=1)
    for _ in range(20):
        next(stream)
        held = [one.held for one in stream._reader.store._shards._streams]
        assert max(held) <= 16 + 4 + 16  # and the last range, which is at most the next window
    assert not stream._reader.store._ahead
    stream.close()


class Letters:
    """Shards in memory, each sample two bytes of its shard: its number."""

    def __init__(self, sizes):
        self.place = [(f"{shard}", 2 * row) for shard, size in enumerate(sizes) for row in range(size)]
        self.files = {
            file: b"".join(n.to_bytes(2, "big") for n, (of, _) in enumerate(self.place) if of == file)
            for file, _ in self.place
        }

    def span(self, sample):
        return (*self.place[sample], 2)

    def unpack(self, sample, raw):
        del sample
        return raw

    def read(self, file, offset, length):
        return self.files[file][offset : offset + length]


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 300),
    st.integers(0, 5),
    st.integers(0, 2**63),
)
@settings(deadline=None, max_examples=40)
def test_every_position_has_its_sample_s_bytes_however_many_epochs_a_window_spans(
    sizes, world, streams_a_rank, window, begin, seed
):
    streams, source = world * streams_a_rank, Letters(sizes)
    order, start = ShardOrder(seed, np.array(sizes), streams, window), begin * streams
    for rank in range(world):
        plan = shard_reads.ReadPlan(order, rank, world, start)
        reads = shard_reads.ShardReads(source, source, plan, 2, skip=lambda _: False, judge=lambda *_: None)
        for sample in order.at(np.arange(start + rank, start + 3 * len(source.place), world)).tolist():
            assert reads.take(sample).result() == sample.to_bytes(2, "big")
        reads.close()


def test_a_resume_within_a_window_reads_only_what_is_left_of_it(tmp_path, monkeypatch):
    root = packed(tmp_path, 80, 10**6)
    monkeypatch.setattr(shard_reads, "_GAP", 1024)
    reads = Reads(monkeypatch)
    with stream_of(
        root, start=14, data__streams=1, data__shuffle_window=20, train__global_batch=2, data__prefetch=1
    ) as stream:
        done = set(stream._order(0, 14)[0].tolist())
        next(stream)
    source = list_images(root).source
    spans = [range(offset, offset + length) for file, offset, length in reads.seen if file.endswith(".tar")]
    read = {row for row in range(80) if any(source.extent(row)[1] in span for span in spans)}
    assert read >= set(stream._order(14, 20)[0].tolist())
    assert not read & done


def listed(run_dir):
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("place", ["indexed", "records"])
def test_a_shard_that_goes_away_is_named_once_and_its_slots_keep_their_samples(place, places, tmp_path, capfd):
    root = shutil.copytree(places / place, tmp_path / place)
    images = list_images(root)
    lost = list(images.source.shards())[1]
    inside = {images.name(row) for row in range(FILES) if images.source_name(row).startswith(lost)}
    assert 1 < len(inside) < 20
    with stream_of(root, run_dir=tmp_path / "run", data__max_bad_fraction=0.6) as stream:
        seen = []
        for step in range(10):
            seen += next(stream).ids.tolist()
            if step == 1:
                (root / lost).unlink()
        assert seen == stream._order(0, 10 * BATCH)[0].tolist()
    assert sorted(entry["file"] for entry in listed(tmp_path / "run")) == sorted(inside)
    said = [line for line in capfd.readouterr().err.splitlines() if lost in line and "is gone" in line]
    assert len(said) == 1


def test_a_record_that_is_damaged_costs_no_other_of_its_range(places, tmp_path):
    root = shutil.copytree(places / "records", tmp_path / "records")
    images = list_images(root)
    file, offset = images.source.extent(5)
    raw = bytearray((root / file).read_bytes())
    raw[offset + 100] ^= 1
    (root / file).write_bytes(raw)
    batches(root, 3, run_dir=tmp_path / "run", data__max_bad_fraction=0.1)
    assert [(Path(entry["file"]).name, entry["reason"]) for entry in listed(tmp_path / "run")] == [
        (Path(images.name(5)).name, "the record's checksum is wrong")
    ]


def test_a_shard_that_is_cut_off_loses_what_is_behind_the_cut_only(places, tmp_path):
    root = shutil.copytree(places / "listed", tmp_path / "listed")
    images = list_images(root)
    name, count = next((name, count) for name, count in images.source.shards().items() if count > 2)
    rows = [row for row in range(FILES) if images.source_name(row).startswith(name)]
    assert len(rows) == count
    path = root / name
    path.write_bytes(path.read_bytes()[: images.source.extent(rows[-1])[1] + 10])
    with stream_of(root, run_dir=tmp_path / "run", data__max_bad_fraction=0.1) as stream:
        for _ in range(3):
            next(stream)
    assert [(entry["file"], entry["reason"]) for entry in listed(tmp_path / "run")] == [
        (images.name(rows[-1]), f"it changed since it was indexed: it has 10 bytes, not {images.source.size(rows[-1])}")
    ]


@pytest.mark.parametrize("wait_s", [60.0, 0.2])
def test_shards_that_come_back_are_waited_for_and_read_by_ranges_again(places, tmp_path, whole, capfd, wait_s):
    root, away = tmp_path / "here" / "indexed", tmp_path / "away"
    shutil.copytree(places / "indexed", root)
    stream = stream_of(root, data__wait_s=wait_s)
    seen = [next(stream).ids.tolist()]
    root.rename(away)
    back = threading.Timer(0.5, lambda: away.rename(root))
    if wait_s > 1:
        back.start()
        seen += [next(stream).ids.tolist() for _ in range(4)]
        back.join()
        assert seen == [[row[1] for row in batch] for batch in whole]
        assert stream.bad == 0
        assert capfd.readouterr().err.count("waiting up to 60 s for it") == 1
    else:
        with pytest.raises(UserError, match=r"here/indexed: the data folder is gone .* has not come back within 0.2 s"):
            list(itertools.islice(stream, 6))
    stream.close()


def test_a_small_set_is_read_once(places, monkeypatch):
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 2**20)
    with stream_of(places / "indexed") as stream:
        for _ in range(5):
            next(stream)
        reads = Reads(monkeypatch)
        for _ in range(3):
            next(stream)
        assert len(reads.seen) <= 2 * STREAMS  # what was planned before it was cached
        for _ in range(6):
            next(stream)
        before = len(reads.seen)
        for _ in range(6):
            next(stream)
        assert len(reads.seen) == before


def test_files_of_their_own_have_no_order_of_shards(places, tmp_path):
    write_classes(tmp_path / "images", 4)
    write_index(tmp_path / "images", tmp_path / "list.tsv")
    game = small_config(write_game(tmp_path / "game"), data__order="shard", actions__groups=["external"])
    config, triplets = resolve_triplets(game)
    with pytest.raises(UserError, match=r"^data\.order is shard, and triplets name their images one by one: set data"):
        require_streams(config, triplets, 1)
    for root, what in (
        (tmp_path / "images", r"images holds no shards \(an image folder\)"),
        (tmp_path / "list.tsv", r"holds no shards \(an image folder in the manifest .*list\.tsv\)"),
    ):
        with pytest.raises(UserError, match=rf"^data\.order is shard, and .*{what}: pack the images with iwm") as told:
            stream_of(root)
        assert "\n" not in str(told.value)
