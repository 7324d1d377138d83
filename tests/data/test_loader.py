from __future__ import annotations

import gc
import itertools
import json
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import broken_tables, encode, picture, turned, write_images
from small_run import small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config.batch import divide_batch
from iwm_fast.data import samples as samples_module
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.order import shuffled
from iwm_fast.data.samples import FileStore
from iwm_fast.data.views.devices import dali_device
from iwm_fast.errors import UserError

FILES = 22  # two and three quarter global batches of 8: batches straddle epochs
BATCHES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, FILES)
    return root


def stream_of(root, *, world=1, rank=0, start=0, run_dir=None, **changes):
    config = small_config(root, **changes)
    return TrainingStream(
        config,
        list_images(root),
        ActionSpace(config.actions.groups),
        rank=rank,
        world=world,
        start=start,
        run_dir=run_dir,
    )


def take(root, count, **options):
    """Return the first `count` global batches of a stream, or of one stream per rank, in the global order."""
    world = options.get("world", 1)
    streams = [stream_of(root, rank=rank, **options) for rank in range(world)]
    rows = []
    for _ in range(count):
        for stream in streams:
            for _ in range(stream.accumulation):
                rows += list(rows_of(next(stream)))
    for stream in streams:
        stream.close()
    return rows


def rows_of(batch):
    context = np.split(batch.patches.context, np.cumsum(batch.patches.context_lengths)[:-1])
    target = np.split(batch.patches.target, np.cumsum(batch.patches.target_lengths)[:-1])
    sources = len(batch.source) // len(batch)
    for row in range(len(batch.source)):
        yield {
            "id": int(batch.ids[row // sources]),
            "epoch": int(batch.epochs[row // sources]),
            "source": batch.source[row].numpy().tobytes(),
            "target": batch.target[row // sources].numpy().tobytes(),
            "action": batch.action[row].numpy().tobytes(),
            "context": context[row].tolist(),
            "predicted": target[row].tolist(),
            "global": (batch.global_context, batch.global_target),
        }


@pytest.fixture(scope="module")
def reference_rows(folder):
    return take(folder, BATCHES)


def test_positions_follow_the_order_of_each_epoch_and_none_is_dropped(reference_rows):
    order = [(epoch, int(i)) for epoch in range(3) for i in shuffled(3, epoch, FILES, np.arange(FILES))]
    assert [(row["epoch"], row["id"]) for row in reference_rows] == order[: 8 * BATCHES]


@pytest.mark.parametrize(
    "options",
    [
        {"world": 2},
        {"world": 4, "train__micro_batch": 1},
        {"train__micro_batch": 3},
        {"data__threads": 2},
        {"data__prefetch": 1},
    ],
    ids=["2 ranks", "4 ranks in singles", "micro-batches", "2 threads", "prefetch 1"],
)
def test_content_does_not_depend_on_how_the_batch_is_divided(folder, reference_rows, options):
    assert take(folder, BATCHES, **options) == reference_rows


@pytest.mark.parametrize("options", [{}, {"world": 2, "train__micro_batch": 2}], ids=["alone", "2 ranks in pairs"])
def test_sources_side_by_side_begin_with_the_only_one(folder, reference_rows, options):
    """Two sources of one target: the first equals a single source's pixels, action and masks."""
    rows = take(folder, BATCHES, views__sources_per_target=2, **options)
    firsts, seconds = rows[::2], rows[1::2]
    for mine, second, alone in zip(firsts, seconds, reference_rows, strict=True):
        for key in ("id", "epoch", "source", "target", "action", "context", "predicted"):
            assert mine[key] == alone[key]
        assert (second["target"], second["id"]) == (mine["target"], mine["id"])
        assert (second["source"], second["context"]) != (mine["source"], mine["context"])
    for first in range(0, len(rows), 16):
        batch = rows[first : first + 16]
        tokens = sum(len(row["context"]) for row in batch), sum(len(row["predicted"]) for row in batch)
        assert {row["global"] for row in batch} == {tokens}


def test_a_stream_resumes_from_any_position(folder, reference_rows):
    assert take(folder, 2, start=8 * 4) == reference_rows[8 * 4 :]


def test_global_counts_are_those_of_all_ranks_and_micro_batches(reference_rows):
    for first in range(0, len(reference_rows), 8):
        batch = reference_rows[first : first + 8]
        tokens = sum(len(row["context"]) for row in batch), sum(len(row["predicted"]) for row in batch)
        assert {row["global"] for row in batch} == {tokens}


def test_a_batch_may_span_many_epochs_of_a_small_set(tmp_path):
    write_images(tmp_path, 3)
    rows = take(tmp_path, 2)
    assert [row["epoch"] for row in rows] == [p // 3 for p in range(16)]
    assert len({row["source"] for row in rows}) > 10  # each epoch samples other parameters


def test_shapes_types_and_geometry(folder):
    with stream_of(folder, actions__groups=["photometric", "geometric"], train__micro_batch=4) as stream:
        assert (stream.micro_batch, stream.accumulation) == (4, 2)
        batch = next(stream)
        assert batch.source.shape == batch.target.shape == (4, 32, 32, 3)
        assert batch.source.dtype == torch.uint8
        assert batch.action.shape == (4, 17)
        assert batch.action.dtype == torch.float32
        assert stream.bad == 0


def test_the_largest_divisor_under_the_ceiling_is_the_micro_batch():
    assert divide_batch(96, 2, None) == (48, 1)
    assert divide_batch(96, 2, 47) == (24, 2)
    assert divide_batch(96, 2, 1000) == (48, 1)
    assert divide_batch(7, 1, 3) == (1, 7)
    with pytest.raises(UserError, match="global_batch is 8, which does not divide evenly over 3 ranks"):
        divide_batch(8, 3, None)


@pytest.fixture
def damaged_folder(tmp_path):
    """30 files, one bad by its header, one found bad by decoding, and one that DALI alone cannot decode."""
    root = tmp_path / "images"
    write_images(root, 30)
    raw = (root / "004.jpg").read_bytes()
    (root / "004.jpg").write_bytes(raw[: len(raw) // 2])
    (root / "011.jpg").write_bytes(broken_tables(encode(picture(40, 30))))
    (root / "017.jpg").write_bytes(encode(picture(40, 30), "GIF"))
    return root


def test_bad_files_are_replaced_alike_on_any_division_and_listed_once(damaged_folder, tmp_path):
    alone, parted = tmp_path / "alone", tmp_path / "parted"
    limit = {"data__max_bad_fraction": 0.1}
    rows = take(damaged_folder, 12, run_dir=alone, **limit)
    assert rows == take(damaged_folder, 12, run_dir=parted, world=2, train__micro_batch=2, **limit)
    for run in (alone, parted):
        lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
        assert sorted(line["file"] for line in lines) == [str(damaged_folder / n) for n in ("004.jpg", "011.jpg")]
        for line in lines:
            assert list(line) == ["file", "reason", "epoch", "sample_id"]
            assert line["reason"]
    drawn = [row["id"] for row in rows]
    assert drawn[:30] == shuffled(3, 0, 30, np.arange(30)).tolist()  # the slot keeps its id
    by_id = {row["id"]: row for row in rows[:30]}
    assert by_id[4]["source"] != by_id[11]["source"]


def test_bad_files_are_counted(damaged_folder):
    with stream_of(damaged_folder, data__max_bad_fraction=0.1) as stream:
        for _ in range(5):
            next(stream)
        assert stream.bad == 2


def test_too_many_bad_files_end_the_stream_with_the_first_ten_named(tmp_path):
    write_images(tmp_path, 40)
    for number in range(12):
        (tmp_path / f"{number:03d}.jpg").write_text("not an image")
    with stream_of(tmp_path) as stream, pytest.raises(UserError, match="of 40 files cannot be decoded") as caught:
        list(itertools.islice(stream, 6))
    with pytest.raises(UserError):  # and again
        next(stream)
    assert "\n" not in str(caught.value)
    assert "cannot identify image file" in str(caught.value)


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_images_of_text_only_are_one_line_that_names_ten(tmp_path, count, limit):
    for number in range(count):
        (tmp_path / f"{number:03d}.jpg").write_text("not an image")
    with stream_of(tmp_path, data__max_bad_fraction=limit) as stream, pytest.raises(UserError) as caught:
        next(stream)
    assert str(caught.value).count("(cannot identify image file)") == min(count, 10)


def test_one_bad_file_of_a_small_set_is_over_one_percent(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "002.jpg").write_bytes(b"")
    with stream_of(tmp_path) as stream, pytest.raises(UserError, match=r"1 of 6 files .*002.jpg \(the file is empty\)"):
        next(stream)


@pytest.mark.parametrize("kept", [samples_module.KEPT_BYTES, 0], ids=["in memory", "read again"])
def test_a_header_is_looked_at_once(folder, monkeypatch, kept):
    looked = []
    inspect = samples_module.inspect
    monkeypatch.setattr(samples_module, "inspect", lambda raw, limit: looked.append(1) or inspect(raw, limit))
    monkeypatch.setattr(samples_module, "KEPT_BYTES", kept)
    take(folder, 3 * FILES // 8)
    assert len(looked) == FILES


def test_the_orientation_is_remembered_with_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)
    (tmp_path / "a.jpg").write_bytes(turned(picture(40, 30), 6))
    store = FileStore(list_images(tmp_path), 10**7)
    seen = [(one.width, one.height, one.orientation, one.lossless) for one in (store.get(0), store.get(0))]
    assert seen == [(30, 40, 6, False)] * 2


def test_a_file_that_changed_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)
    paths = write_images(tmp_path, 1)
    store = FileStore(list_images(tmp_path), 10**7)
    assert store.get(0).width == 40
    paths[0].write_bytes(encode(picture(90, 60)))
    assert store.get(0).width == 90


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_over_fifty_epochs_of_a_small_set(folder):
    """If an epoch's output were kept, 22 pairs of 12 kB views, it would show as 26 MB."""

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with stream_of(folder, train__global_batch=FILES, model__image=64) as stream:
        for _ in range(15):
            next(stream)
        before = resident()
        for _ in range(50):
            next(stream)
        assert resident() - before < 8 * 2**20


def test_closing_ends_the_thread_and_the_stream(folder):
    before = set(threading.enumerate())
    stream = stream_of(folder)
    next(stream)
    stream.close()
    stream.close()
    assert set(threading.enumerate()) - before == set()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_an_error_in_the_thread_is_raised_where_the_batch_is_requested(folder, monkeypatch):
    def fail(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr(samples_module.FileStore, "get", fail)
    with stream_of(folder) as stream, pytest.raises(OSError, match="the disk went away"):
        next(stream)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    assert dali_device("auto") == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        dali_device("gpu")
