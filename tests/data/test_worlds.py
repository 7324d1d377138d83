"""An epoch has the same samples, parameters and pixels on any number of ranks; a run resumes on another number."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from made_images import broken_tables, encode, picture, turned, write_images
from small_run import small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream

FILES = 40
EPOCHS = 2
BATCH = 8  # divides an epoch, and so do 4 and 20; 16 does not


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write plain files, one that EXIF turns, and one that is replaced once it is decoded."""
    root = tmp_path_factory.mktemp("worlds")
    write_images(root, FILES)
    (root / "005.jpg").write_bytes(turned(picture(44, 31), 6))
    (root / "011.jpg").write_bytes(broken_tables(encode(picture(40, 30))))
    return root


def digest(*tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def consume(root, positions, *, batch=BATCH, world=1, **changes):
    """Return what ranks see of positions (start, stop) in the global order: (epoch, id, parameters, pixels) each."""
    start, stop = positions
    config = small_config(root, train__global_batch=batch, data__max_bad_fraction=0.1, **changes)
    space = ActionSpace(config.actions.groups)
    seen = []
    for rank in range(world):
        with TrainingStream(config, list_images(root), space, rank=rank, world=world, start=start) as stream:
            for _ in range(-(-(stop - start) // batch) * stream.accumulation):
                micro = next(stream)
                sources = len(micro.source) // len(micro)
                for row, (epoch, sample) in enumerate(zip(micro.epochs.tolist(), micro.ids.tolist(), strict=True)):
                    own = slice(row * sources, (row + 1) * sources)
                    seen.append(
                        (epoch, sample, digest(micro.action[own]), digest(micro.source[own], micro.target[row]))
                    )
    return seen


@pytest.fixture(scope="module")
def whole(folder):
    return consume(folder, (0, EPOCHS * FILES))


def test_an_epoch_has_every_sample_once(whole):
    assert sorted(row[:2] for row in whole) == [(epoch, i) for epoch in range(EPOCHS) for i in range(FILES)]
    assert len({row[3] for row in whole}) == len(whole)


@pytest.mark.parametrize(
    "options",
    [
        {"world": 2},
        {"world": 4},
        {"world": 4, "data__threads": 2, "train__micro_batch": 1},
        {"batch": 4},
        {"batch": 20, "world": 2, "train__micro_batch": 5},
        {"batch": 16, "data__threads": 3},
    ],
    ids=lambda options: ", ".join(f"{key.rsplit('__', 1)[-1]} {value}" for key, value in options.items()),
)
def test_samples_parameters_and_pixels_of_an_epoch_are_the_same(folder, whole, options):
    assert set(consume(folder, (0, EPOCHS * FILES), **options)) == set(whole)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 4), (4, 1)], ids=lambda worlds: f"{worlds[0]} to {worlds[1]}")
def test_a_run_stopped_at_37_percent_resumes_on_another_number_of_ranks(folder, whole, worlds):
    """Nothing twice, nothing missing, nothing changed; the stop is at the last step before 37 % of all samples."""
    stop = int(0.37 * len(whole)) // BATCH * BATCH
    assert 0 < stop < FILES
    before = consume(folder, (0, stop), world=worlds[0])
    after = consume(folder, (stop, len(whole)), world=worlds[1])
    assert set(before) == set(whole[:stop])
    assert Counter(before + after) == Counter(whole)
