"""The order of an epoch: a bijection at every length, uniform by several counts, equal to its scalar construction."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.data import order as order_module
from iwm_fast.data.order import FEISTEL, SORTED, SampleOrder, require_order, shuffled, sorted_order
from iwm_fast.data.randomness import SHUFFLE, words
from iwm_fast.errors import UserError

# The only order before this one existed, by (seed, epoch). Runs begun with it finish in it.
OLD = {
    (3, 0): [4, 17, 20, 18, 11, 13, 8, 14, 23, 3, 12, 9, 0, 5, 6, 21, 22, 2, 16, 19, 15, 1, 7, 10],
    (3, 1): [14, 1, 3, 12, 9, 6, 0, 13, 22, 10, 7, 17, 4, 23, 5, 21, 11, 15, 16, 8, 19, 2, 18, 20],
    (2**63 + 5, 7): [6, 4, 7, 0, 2, 5, 1, 10, 9, 3, 8],
}
# The same of this version, at (3, 0); and three positions of 10⁹ at (2**63 + 5, 7).
NOW = [19, 15, 10, 9, 11, 1, 4, 21, 3, 0, 6, 7, 16, 14, 12, 2, 8, 20, 17, 23, 13, 5, 22, 18]
NOW_LARGE = [602658495, 261903296, 748898542]


def whole(seed, epoch, n):
    return shuffled(seed, epoch, n, np.arange(n))


def orders(seed, epochs, n):
    """Return the orders of many epochs, (epochs, n), by one vectorised walk over all of them."""
    keys = np.repeat(words(seed, np.arange(epochs), 0, SHUFFLE, order_module.ROUNDS).T, n, axis=1)
    rows = math.isqrt(n - 1) + 1
    sides = np.uint64(rows), np.uint64(-(-n // rows))
    found = order_module._encrypted(np.tile(np.arange(n, dtype=np.uint64), epochs), keys, *sides)
    while len(beyond := np.flatnonzero(found >= n)):
        found[beyond] = order_module._encrypted(found[beyond], keys[:, beyond], *sides)
    return found.astype(np.int64).reshape(epochs, n)


def position_of(seed, epoch, n, sample):
    """Invert `shuffled` with Python's own integers."""
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = [int(key) for key in words(seed, epoch, 0, SHUFFLE, 24)[0]]

    def function(half, key, size):
        mixed = (half + key) % 2**64
        mixed = (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 29) * 0x94D049BB133111EB % 2**64
        return (mixed >> 32) * size >> 32

    while True:
        left, right = divmod(sample, columns)
        for at in range(22, -2, -2):
            right = (right - function(left, keys[at + 1], columns)) % columns
            left = (left - function(right, keys[at], rows)) % rows
        sample = left * columns + right
        if sample < n:
            return sample


def chi_square(counts, cells=None):
    """Return how many standard deviations χ² of equal expected counts lies from its mean."""
    counts = np.asarray(counts, float).ravel()
    expected = counts.mean()
    freedom = counts.size - 1 if cells is None else cells
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("lengths", [range(800), pytest.param(range(800, 5000), marks=pytest.mark.slow)], ids=str)
def test_every_length_up_to_a_few_thousand_has_each_sample_once(lengths):
    for n in lengths:
        found = np.zeros(n, np.int64)
        found[whole(n, n % 7, n)] += 1
        assert found.all(), n


@pytest.mark.parametrize("n", [70_001, 2**20, 10**6 + 3])
def test_long_epochs_have_each_sample_once(n):
    seen = np.zeros(n, np.uint8)
    seen[whole(3, 2, n)] = 1
    assert seen.all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 10**9), st.integers(0, 10**9))
@settings(deadline=None, max_examples=50)
def test_samples_lead_back_to_their_positions(seed, epoch, n, place):
    positions = np.array([place % n, n // 2, n - 1])
    samples = shuffled(seed, epoch, n, positions)
    assert ((samples >= 0) & (samples < n)).all()
    assert [position_of(seed, epoch, n, int(sample)) for sample in samples] == positions.tolist()


@pytest.mark.parametrize("n", [10**9, 10**9 - 7, 2**45 + 1])
def test_positions_of_a_huge_epoch_have_distinct_samples_over_all_of_it(n):
    for first in (0, n // 3, n - 40_000):
        samples = shuffled(11, 1, n, np.arange(first, first + 40_000))
        assert len(np.unique(samples)) == 40_000
        # 100 cells of 400: χ² with 99 degrees of freedom.
        assert abs(chi_square(np.bincount(samples * 100 // n, minlength=100))) < 4


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_of_few_samples_are_equally_frequent(n):
    epochs = 60_000
    found = orders(7, epochs, n)
    np.testing.assert_array_equal(found[:3], [whole(7, epoch, n) for epoch in range(3)])
    _, counts = np.unique(found @ n ** np.arange(n), return_counts=True)
    assert len(counts) == math.factorial(n)
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("n", [17, 64, 101])
def test_every_sample_is_equally_frequent_at_every_position(n):
    epochs = 3000
    found = orders(5, epochs, n)
    counts = np.bincount((np.arange(n) * n + found).ravel(), minlength=n * n)
    # Rows and columns of the n × n table have fixed sums.
    assert abs(chi_square(counts, (n - 1) ** 2)) < 4
    pairs = (found[:, :-1] * n + found[:, 1:]).ravel()
    followers = np.bincount(pairs, minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]
    assert abs(chi_square(followers)) < 4.5


def test_neighbours_epochs_and_seeds_are_independent():
    n, cells = 100_003, 32
    one = whole(0, 0, n)
    for other in (np.roll(one, 1), np.roll(one, 317), whole(0, 1, n), whole(1, 0, n), whole(2**63, 0, n), np.arange(n)):
        table = np.bincount(one * cells // n * cells + other * cells // n, minlength=cells * cells)
        assert abs(chi_square(table, (cells - 1) ** 2)) < 4
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n)
    steps = np.diff(one) % n
    assert abs(chi_square(np.bincount(steps * 64 // n, minlength=64))) < 4


def test_orders_differ_by_seed_and_epoch():
    found = [tuple(whole(seed, epoch, 50)) for seed in (0, 1, 2**32, 2**63) for epoch in (0, 1, 2**40)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", [FEISTEL, SORTED])
@pytest.mark.parametrize("count", [1, 5, 40_000])
def test_order_is_by_position_whatever_was_asked_before(kind, count):
    order = SampleOrder(1, count, kind)
    stops = sorted({0, 3, 9, 12, count + 1, 2 * count - 1, 2 * count + 3, 3 * count + 12})
    order(40, 44)
    parts = [order(start, stop) for start, stop in pairwise(stops)]
    ids, epochs = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert epochs.tolist() == [p // count for p in range(stops[-1])]
    rule = sorted_order(1, 2, count) if kind == SORTED else whole(1, 2, count)
    np.testing.assert_array_equal(ids[2 * count : 3 * count], rule[: len(ids[2 * count : 3 * count])])
    again, _ = order(5, count + 9)
    np.testing.assert_array_equal(again, ids[5 : count + 9])


def test_memory_of_an_order_does_not_grow_with_the_epoch():
    order = SampleOrder(1, 10**9)
    for start in range(0, 10**9, 10**8):
        ids, epochs = order(start, start + 4096)
        assert ids.shape == epochs.shape == (4096,)
    assert sum(block.nbytes for block in order._blocks.values()) <= 2 * 8 * 16384


@pytest.mark.parametrize(("seed", "epoch"), OLD)
def test_the_earlier_order_stays_as_it_was(seed, epoch):
    expected = OLD[seed, epoch]
    assert sorted_order(seed, epoch, len(expected)).tolist() == expected
    ids, _ = SampleOrder(seed, len(expected), SORTED)(epoch * len(expected), (epoch + 1) * len(expected))
    assert ids.tolist() == expected


def test_the_order_of_this_version_stays_as_it_is():
    assert whole(3, 0, 24).tolist() == NOW
    assert shuffled(2**63 + 5, 7, 10**9, np.array([0, 1, 10**9 - 1])).tolist() == NOW_LARGE


def test_an_unknown_order_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^run/step_7: its samples come in the order 'spiral', which this .*$") as told:
        require_order("spiral", "run/step_7")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="must be one of"):
        SampleOrder(0, 1, "spiral")
