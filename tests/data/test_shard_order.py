"""The order of shards: every sample once per epoch at any division, streams of whole runs of shards, windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_run import small_config

from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.order import ROUNDS, permuted
from iwm_fast.data.randomness import WINDOWS, words
from iwm_fast.data.shard_order import ShardOrder, order_of_samples, require_streams
from iwm_fast.errors import UserError

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any)
# The first 24 samples of shards of 5, 0, 7, 2 and 10, 3 streams, windows of 4, seed 3.
NOW = [8, 16, 13, 6, 18, 12, 7, 15, 23, 5, 17, 0, 9, 20, 1, 10, 19, 4, 14, 21, 3, 11, 22, 2]


@given(
    SIZES,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 2**63),
)
@settings(deadline=None, max_examples=40)
def test_every_sample_comes_once_per_epoch_on_any_division(sizes, world, streams_a_rank, rows, window, seed):
    streams = world * streams_a_rank
    batch, count = rows * streams, sum(sizes)
    order = ShardOrder(seed, np.array(sizes), streams, window)
    ids, epochs = order(0, -(-3 * count // batch) * batch)
    by_rank = [
        {
            (stream, epoch, sample)
            for stream, epoch, sample in zip(np.arange(len(ids)) % streams, epochs.tolist(), ids.tolist(), strict=True)
            if stream % world == rank
        }
        for rank in range(world)
    ]
    assert [len(share) for share in by_rank] == [len(ids) // world] * world  # equal, and nothing twice
    seen = sorted((epoch, sample) for share in by_rank for _, epoch, sample in share)
    assert seen[: 3 * count] == [(epoch, sample) for epoch in range(3) for sample in range(count)]


@given(SIZES, st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**63), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_a_position_has_one_sample_whatever_is_asked_and_streams_are_equal(sizes, streams, window, seed, epoch):
    count = sum(sizes)
    order = ShardOrder(seed, np.array(sizes), streams, window)
    positions = np.arange(epoch * count, (epoch + 2) * count)
    whole = order.at(positions)
    again = ShardOrder(seed, np.array(sizes), streams, window)
    np.testing.assert_array_equal(again.at(positions[::-1])[::-1], whole)
    rows = range(0, 2 * count, 1 + count // 3)
    np.testing.assert_array_equal([again.at(positions[[row]])[0] for row in rows], whole[rows])
    lengths = np.bincount(positions[:count] % streams, minlength=streams)
    assert lengths.max() - lengths.min() <= 1


def windows_of(order, stream, epoch):
    """Return the windows of a stream in an epoch, by its own word: lists of samples."""
    positions = np.arange(epoch * order.count, (epoch + 1) * order.count)
    left = positions[positions % order.streams == stream].tolist()
    found = []
    while left:
        size = order.left_in_window(left[0])
        found.append(order.at(np.array(left[:size])).tolist())
        left = left[size:]
    return found


@given(SIZES, st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_windows_are_consecutive_samples_of_shards_and_streams_part_few_shards(sizes, streams, window, seed):
    order = ShardOrder(seed, np.array(sizes), streams, window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    visits = 0
    for stream in range(streams):
        windows = windows_of(order, stream, 1)
        lengths = {len(one) for one in windows}
        assert not windows or (max(lengths) <= order.window <= window and max(lengths) - min(lengths) <= 1)
        before = None  # in its window's shards a stream never goes back
        for samples in windows:
            for shard in dict.fromkeys(shard_of[sorted(samples)].tolist()):
                inside = sorted(sample for sample in samples if shard_of[sample] == shard)
                assert inside == list(range(inside[0], inside[-1] + 1))
                if before and before[0] == shard:
                    assert inside[0] == before[1] + 1
                before = None
        last = [sample for samples in windows for sample in sorted(samples)]
        visits += len({shard_of[sample] for sample in last})
    assert visits <= sum(map(bool, sizes)) + streams - 1


@given(SIZES, st.integers(1, 4), st.integers(1, 9), st.integers(1, 100))
@settings(deadline=None, max_examples=15)
def test_a_window_may_be_entered_anywhere(sizes, streams, window, position):
    order = ShardOrder(5, np.array(sizes), streams, window)
    left = order.left_in_window(position)
    assert 1 <= left <= order.window
    for step in range(1, left):
        assert order.left_in_window(position + step * streams) == left - step


def test_shards_and_windows_differ_by_seed_epoch_and_stream():
    order = ShardOrder(0, np.full(40, 25), 4, 25)
    firsts = [[samples[0] // 25 for samples in windows_of(order, stream, 0)] for stream in range(4)]
    assert len({shard for stream in firsts for shard in stream}) > 30
    assert firsts != [[samples[0] // 25 for samples in windows_of(order, stream, 1)] for stream in range(4)]
    within = [tuple(np.argsort(samples)) for stream in range(4) for samples in windows_of(order, stream, 0)]
    assert len(set(within)) == len(within)
    other = ShardOrder(1, np.full(40, 25), 4, 25)
    assert not np.array_equal(order(0, 100)[0], other(0, 100)[0])


def test_every_place_of_a_window_has_each_of_its_samples_equally_often():
    order = ShardOrder(3, np.full(8, 1000), 8, 10)
    samples, _ = order(0, 10 * 8000)
    ranks = samples.reshape(-1, 10, 8).argsort(axis=1).argsort(axis=1)  # 8,000 windows of 10, by place
    table = np.stack([np.bincount(ranks[:, place].ravel(), minlength=10) for place in range(10)])
    expected = table.sum() / 100
    assert abs(((table - expected) ** 2 / expected).sum() - 81) < 4 * np.sqrt(2 * 81)


def test_permutations_of_many_sizes_at_once_are_bijections():
    sizes = np.repeat(np.arange(1, 120), np.arange(1, 120))
    places = np.concatenate([np.arange(size) for size in range(1, 120)])
    keys = words(7, 0, sizes, WINDOWS, ROUNDS).T
    found = permuted(keys, sizes, places)
    for size in range(1, 120):
        assert sorted(found[sizes == size].tolist()) == list(range(size))


def test_the_order_of_this_version_stays_as_it_is():
    assert ShardOrder(3, np.array([5, 0, 7, 2, 10]), 3, 4)(0, 24)[0].tolist() == NOW


@pytest.mark.parametrize("argument", [{"streams": 0}, {"window": 0}, {"sizes": np.array([0])}])
def test_an_order_of_nothing_is_a_value_error(argument):
    with pytest.raises(ValueError, match="all must be 1 or more"):
        ShardOrder(0, **({"sizes": np.array([3]), "streams": 1, "window": 1} | argument))


class Shards:
    """A source of shards, by their samples. named: whether it lists them."""

    kind = "webdataset"

    class storage:  # noqa: N801  (an attribute)
        root = "/shards"

    def __init__(self, *sizes, named=True):
        self.sizes, self.named = sizes, named
        self.of = np.repeat(np.arange(len(sizes)), sizes)
        self.looks = 0

    def span(self, row):
        return (*self.extent(row), 1)

    def unpack(self, row, raw):  # noqa: ARG002  (a Packed's)
        return raw

    def __len__(self):
        return len(self.of)

    def shards(self):
        return {f"{at}.tar": size for at, size in enumerate(self.sizes)} if self.named else None

    def extent(self, row):
        self.looks += 1
        return f"{self.of[row]}.tar", 0


def shard_config(streams, batch, **more):
    changes = {"data__order": "shard", "data__streams": streams, "train__global_batch": batch} | more
    return small_config("/shards", **changes)


SMALLER = "write smaller shards (--shard-size), at least one per rank (16), or set data.order=sample"
RESUMED = "or, to resume a run, launch a number of ranks that divides its streams"
MULTIPLE = "make train.global_batch a multiple of the 5 ranks, or change their number"


@pytest.mark.parametrize(
    ("streams", "batch", "world", "said"),
    [
        (64, 64, 1, "64, more than the 10 shards of /shards; set data.streams=8"),
        (64, 60, 3, "64, more than the 10 shards of /shards; set data.streams=6"),
        (8, 64, 16, f"8, which 16 ranks cannot share evenly; {SMALLER}"),
        (4, 16, 8, f"4, which 8 ranks cannot share evenly; set data.streams=8, {RESUMED}"),
        (8, 60, 3, f"8, which 3 ranks cannot share evenly; set data.streams=6, {RESUMED}"),
        (10, 64, 2, "10, which does not divide train.global_batch (64); set data.streams=8"),
        (10, 64, 5, f"10, which does not divide train.global_batch (64); {MULTIPLE}"),
    ],
)
def test_streams_that_do_not_fit_are_one_line_with_what_to_set(streams, batch, world, said):
    images = ImageSet(Shards(*range(1, 11), 0))
    with pytest.raises(UserError) as caught:
        require_streams(shard_config(streams, batch), images, world)
    assert str(caught.value) == f"data.streams is {said}"


@given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 4), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_the_streams_that_an_error_names_fit(shards, streams, world, rows):
    images, batch = ImageSet(Shards(*[3] * shards)), rows * world
    try:
        require_streams(shard_config(streams, batch), images, world)
    except UserError as error:
        assume("set data.streams=" in str(error))
        fitting = int(str(error).partition("set data.streams=")[2].partition(",")[0])
        require_streams(shard_config(fitting, batch), images, world)
    else:
        assert streams <= shards
        assert (streams % world, batch % streams) == (0, 0)


def test_shards_that_a_source_does_not_list_are_found_by_few_looks():
    sizes = [100] * 50 + [3, 170, 1, 1, 99] + [100] * 40
    listed, found = Shards(*sizes), Shards(*sizes, named=False)
    config = shard_config(8, 8)
    orders = [order_of_samples(config, ImageSet(source), 1, "feistel") for source in (listed, found)]
    assert orders[0].facts() == orders[1].facts()
    assert found.looks < 4 * len(sizes)
