"""The stream of triplets: each sample's pictures and action, their order, and bad pictures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from made_images import broken_tables, encode, picture
from made_triplets import rows_of_manifest, write_game, write_lines
from PIL import Image
from small_run import small_config

from iwm_fast.actions.external import space_of
from iwm_fast.data.order import shuffled
from iwm_fast.data.triplet_stream import PairStream
from iwm_fast.data.triplets import resolve_triplets
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.errors import UserError

TRIPLETS = 24
BATCHES = 4


def stream_of(root, *, world=1, rank=0, start=0, run_dir=None, **changes):
    config, triplets = resolve_triplets(small_config(root, actions__groups=["external"], **changes))
    space = space_of(config.actions)
    return PairStream(config, triplets, space, rank=rank, world=world, start=start, run_dir=run_dir)


def take(root, count, **options):
    """Return the first global batches of a stream, or of one per rank: (id, epoch, source, target, action, patches)."""
    streams = [stream_of(root, rank=rank, **options) for rank in range(options.get("world", 1))]
    rows = []
    for _ in range(count):
        for stream in streams:
            for _ in range(stream.accumulation):
                batch = next(stream)
                context = np.split(batch.patches.context, np.cumsum(batch.patches.context_lengths)[:-1])
                for i in range(len(batch)):
                    action = tuple(batch.action[i].tolist())
                    pictures = batch.source[i].numpy(), batch.target[i].numpy()
                    rows.append((int(batch.ids[i]), int(batch.epochs[i]), *pictures, action, context[i].tolist()))
    for stream in streams:
        stream.close()
    return rows


def same(rows, others):
    return len(rows) == len(others) and all(
        a[:2] == b[:2] and a[4:] == b[4:] and (a[2] == b[2]).all() and (a[3] == b[3]).all()
        for a, b in zip(rows, others, strict=True)
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_game(tmp_path_factory.mktemp("game"))


@pytest.fixture(scope="module")
def reference(manifest):
    return take(manifest, BATCHES)


def test_a_sample_is_its_triplet_s_two_pictures_untouched_and_its_action(manifest, reference):
    """Pictures of the model's own size pass DALI's decode and resize unchanged."""
    rows = rows_of_manifest(manifest)
    for sample, _, source, target, action, _ in reference:
        row = rows[sample]
        for pixels, name in ((source, row["source"]), (target, row["target"])):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(manifest.parent / name)))
        np.testing.assert_allclose(action, np.array(row["action"]) / [2, 4], rtol=1e-6)


def test_a_source_with_a_history_is_the_frames_up_to_its_own(manifest):
    rows = rows_of_manifest(manifest)
    with stream_of(manifest, model__history=3) as stream:
        batch = next(stream)
    frames = batch.source.unflatten(0, (8, 3)).numpy()
    for i, sample in enumerate(batch.ids.tolist()):
        first = sample - rows[sample]["step"]  # of its episode
        names = [rows[max(sample - back, first)]["source"] for back in (2, 1, 0)]
        for pixels, name in zip((*frames[i], batch.target[i]), (*names, rows[sample]["target"]), strict=True):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(manifest.parent / name)))


def ahead(root, count, **options):
    """Return {(id, epoch): the pictures of its steps and their actions} of the first batches of a stream or several."""
    streams = [stream_of(root, rank=rank, train__horizon=4, **options) for rank in range(options.get("world", 1))]
    found, totals = {}, set()
    for stream in (s for _ in range(count) for s in streams):
        for _ in range(stream.accumulation):
            batch = next(stream)
            totals.add(batch.global_target)
            rows = [(sample, step) for step in range(4) for sample in range(len(batch)) if batch.steps[sample] > step]
            assert len(rows) == len(batch.target) == len(batch.action)
            for (sample, _), pixels, action in zip(rows, batch.target.numpy(), batch.action.numpy(), strict=True):
                key = int(batch.ids[sample]), int(batch.epochs[sample])
                found.setdefault(key, []).append((pixels, action))
    for stream in streams:
        stream.close()
    return found, totals


def test_a_sample_goes_on_with_the_triplets_that_follow_it_to_the_end_of_its_episode(manifest):
    rows = rows_of_manifest(manifest)  # four episodes of six steps
    found, totals = ahead(manifest, 3)
    assert len(found) == TRIPLETS
    assert len(totals) == 3
    assert sum(totals) == 16 * 4 * (6 + 5 + 4 + 3)  # all patches of all steps that there are
    for (sample, _), steps in found.items():
        assert len(steps) == min(4, 6 - rows[sample]["step"])
        for row, (pixels, action) in zip(rows[sample:], steps, strict=False):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(manifest.parent / row["target"])))
            np.testing.assert_allclose(action, np.array(row["action"]) / [2, 4], rtol=1e-6)
    for options in ({"world": 2, "train__micro_batch": 2}, {"train__micro_batch": 1}):
        parted, same_totals = ahead(manifest, 3, **options)
        assert same_totals == totals
        assert parted.keys() == found.keys()
        for key, steps in found.items():
            for (pixels, action), (other, told) in zip(steps, parted[key], strict=True):
                assert (pixels == other).all()
                assert (action == told).all()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, 28), ({"model__history": 2}, 28), ({"actions__flip_probability": 0.5}, 48)],
    ids=["", "history", "a flip of each triplet's own"],
)
def test_a_frame_that_several_triplets_of_a_batch_show_is_decoded_once(manifest, monkeypatch, changes, wanted):
    """All 24 triplets of 28 frames in one batch, of which each has two."""
    decoded = []
    submit = ViewGraph.submit

    def noting(graph, encoded, views):
        decoded.append(len(encoded))
        submit(graph, encoded, views)

    monkeypatch.setattr(ViewGraph, "submit", noting)
    with stream_of(manifest, train__global_batch=24, **changes) as stream:
        next(stream)
    assert decoded[0] == wanted


def test_positions_follow_the_order_of_each_epoch(reference):
    order = [(int(i), epoch) for epoch in range(2) for i in shuffled(3, epoch, TRIPLETS, np.arange(TRIPLETS))]
    assert [row[:2] for row in reference] == order[: 8 * BATCHES]


@pytest.mark.parametrize(
    "options",
    [{"world": 2}, {"world": 4, "train__micro_batch": 1}, {"train__micro_batch": 3}, {"data__prefetch": 1}],
    ids=["2 ranks", "4 ranks in singles", "micro-batches", "prefetch 1"],
)
def test_content_does_not_depend_on_how_the_batch_is_divided(manifest, reference, options):
    assert same(take(manifest, BATCHES, **options), reference)


def test_a_stream_resumes_from_any_position(manifest, reference):
    assert same(take(manifest, 1, start=8 * 3), reference[8 * 3 :])


def test_a_crop_and_a_flip_are_the_same_for_both_pictures(tmp_path):
    """Source and target are one file here, so any difference was done to one of them only."""
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(48, 40, number), "PNG"))
    rows = [{"source": f"{n}.png", "target": f"{n}.png", "action": 0} for n in range(8)]
    manifest = write_lines(tmp_path / "m.jsonl", *rows)
    changes = {"actions__crop_scale": [0.3, 0.6], "actions__flip_probability": 0.5}
    cropped = take(manifest, 4, **changes)
    assert all((row[2] == row[3]).all() for row in cropped)
    whole = {row[0]: row[2] for row in take(manifest, 1)}
    assert all((row[2] != whole[row[0]]).any() for row in cropped)
    mirrored = take(manifest, 4, actions__flip_probability=0.5)
    flips = {bool((row[2] == whole[row[0]][:, ::-1]).all()) for row in mirrored}
    assert flips == {True, False}
    assert all((row[2] == row[3]).all() for row in mirrored)


def test_a_wide_picture_is_squeezed_whole(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :3], wide[:, -3:] = (255, 0, 0), (0, 0, 255)
    (tmp_path / "a.png").write_bytes(encode(wide, "PNG"))
    row = {"source": "a.png", "target": "a.png", "action": 1}
    (_, _, source, *_) = take(write_lines(tmp_path / "m.jsonl", row), 1)[0]
    assert source[:, 0, 0].min() > 120
    assert source[:, -1, 2].min() > 120


@pytest.fixture
def damaged(tmp_path):
    """Frame 3 is bad by its header; frame 9 is a JPEG that only decoding finds bad; 20 has another size."""
    manifest = write_game(tmp_path / "game")
    frames = manifest.parent / "frames"
    (frames / "003.png").write_bytes(b"")
    (frames / "009.png").write_bytes(broken_tables(encode(picture(32, 32))))
    (frames / "020.png").write_bytes(encode(picture(40, 32), "PNG"))
    return manifest


def test_triplets_with_a_bad_picture_are_replaced_alike_on_any_division_and_listed_once(damaged, tmp_path):
    limit = {"data__max_bad_fraction": 0.5}
    rows = take(damaged, 6, run_dir=tmp_path / "alone", **limit)
    parted = take(damaged, 6, run_dir=tmp_path / "parted", world=2, train__micro_batch=2, **limit)
    assert same(rows, parted)
    for run in ("alone", "parted"):
        lines = [json.loads(line) for line in (tmp_path / run / "bad_samples.jsonl").read_text().splitlines()]
        names = sorted(line["file"].rsplit("/", 1)[1] for line in lines)
        assert names == ["003.png", "009.png", "020.png"]
        assert {line["file"][-7:]: line["reason"] for line in lines}["020.png"] == (
            "40 x 32 pixels, and the source of its triplet 32 x 32: they must be of one size"
        )
    assert [row[0] for row in rows[:TRIPLETS]] == shuffled(3, 0, TRIPLETS, np.arange(TRIPLETS)).tolist()
    wanted = rows_of_manifest(damaged)
    good = [r for r in wanted if not any(n in r["source"] + r["target"] for n in ("003", "009", "020"))]
    told = {tuple(np.float32(np.array(r["action"]) / [2, 4]).tolist()): r for r in good}
    for _, _, source, target, action, _ in rows:  # whatever replaces a sample is one whole good triplet
        row = told[action]
        np.testing.assert_array_equal(source, np.asarray(Image.open(damaged.parent / row["source"])))
        np.testing.assert_array_equal(target, np.asarray(Image.open(damaged.parent / row["target"])))


def test_a_replacement_has_the_steps_of_the_sample_that_it_replaces(damaged):
    """So every rank knows how many there are, whichever files are bad."""
    found, totals = ahead(damaged, 3, data__max_bad_fraction=0.5)
    assert sum(totals) == 16 * 4 * (6 + 5 + 4 + 3)
    rows = rows_of_manifest(damaged)
    assert {sample: len(steps) for (sample, _), steps in found.items()} == {
        sample: min(4, 6 - row["step"]) for sample, row in enumerate(rows)
    }


def test_too_many_bad_pictures_end_the_stream_in_one_line(damaged):
    with stream_of(damaged) as stream, pytest.raises(UserError, match=r"of 28 files cannot be decoded") as caught:
        list(itertools.islice(stream, 6))
    assert "\n" not in str(caught.value)


def test_pictures_that_are_not_there_are_one_line(tmp_path):
    rows = [{"source": f"{n}.png", "target": f"{n + 1}.png", "action": [0.5]} for n in range(3)]
    manifest = write_lines(tmp_path / "m.jsonl", *rows)
    with stream_of(manifest) as stream, pytest.raises(UserError, match=r"0\.png \(cannot be read: No such file"):
        next(stream)


def test_masks_of_visible_blocks_alone_hide_nothing(manifest):
    masks = {"target_blocks": 2, "visible_blocks": 2, "context_scale": [1.0, 1.0], "min_context": 2}
    with stream_of(manifest, masks=masks) as stream:
        batch = next(stream)
    assert batch.patches.context.tolist() == list(range(16)) * 8
    assert batch.source.dtype == torch.uint8
