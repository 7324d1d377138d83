"""Philox against Random123's known answers, and properties of the samples: invariance, independence, uniformity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.data import randomness
from iwm_fast.data.randomness import philox, uniforms, words

ids = st.integers(0, 2**63 - 1)
seeds = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    def words(text):
        return tuple(np.array([int(word, 16)] * 3, np.uint64) for word in text.split())

    for word, want in zip(philox(words(counter), words(key)), expected.split(), strict=True):
        np.testing.assert_array_equal(word, [int(want, 16)] * 3)


def python_uniforms(seed, epoch, sample, stream, count):
    """Compute the documented construction with Python's own integers."""

    def block(c, k):
        c, k = list(c), list(k)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    n = block((epoch % 2**32, epoch >> 32, sample % 2**32, sample >> 32), (seed % 2**32, seed >> 32))
    numbers = []
    for index in range((count + 1) // 2):
        w = block((index, stream, n[2], n[3]), (n[0], n[1]))
        numbers += [((w[0] << 32 | w[1]) >> 11) / 2**53, ((w[2] << 32 | w[3]) >> 11) / 2**53]
    return numbers[:count]


@given(seeds, ids, ids, st.integers(0, 2**32 - 1), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_vectorised_draws_equal_the_scalar_construction(seed, epoch, sample, stream, count):
    np.testing.assert_array_equal(
        uniforms(seed, epoch, sample, stream, count)[0], python_uniforms(seed, epoch, sample, stream, count)
    )


@given(seeds, st.lists(st.tuples(ids, ids), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=50)
def test_draws_do_not_depend_on_the_batch_or_on_their_number(seed, samples, data):
    epoch, sample = np.array(samples, np.int64).T
    whole = uniforms(seed, epoch, sample, 1, 7)
    order = np.array(data.draw(st.permutations(range(len(samples)))))
    np.testing.assert_array_equal(uniforms(seed, epoch[order], sample[order], 1, 7), whole[order])
    np.testing.assert_array_equal(uniforms(seed, epoch[:1], sample[:1], 1, 7), whole[:1])
    np.testing.assert_array_equal(uniforms(seed, epoch, sample, 1, 3), whole[:, :3])
    np.testing.assert_array_equal(uniforms(seed, epoch, sample, 1, 3, start=4), whole[:, 4:])


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_every_bit_of_seed_epoch_and_sample_enters(bit):
    base = uniforms(0, 0, 0, 1, 4)
    assert (uniforms(1 << bit, 0, 0, 1, 4) != base).all()
    if bit < 63:
        assert (uniforms(0, 1 << bit, 0, 1, 4) != base).all()
        assert (uniforms(0, 0, 1 << bit, 1, 4) != base).all()


def test_streams_have_distinct_numbers_and_draws():
    names = ("VIEWS", "SOURCE_GEOMETRY", "MASKS", "ORDER", "BANK", "REPLACEMENT", "COMPRESSION", "SHUFFLE")
    streams = [getattr(randomness, name) for name in names]
    assert len(set(streams)) == len(streams)
    assert len({uniforms(0, 0, 0, stream, 1).item() for stream in streams}) == len(streams)


def test_draws_are_uniform_and_uncorrelated():
    n = 20_000
    for draws in (uniforms(5, 0, np.arange(n), 1, 4), uniforms(5, np.arange(n), 0, 1, 4), uniforms(5, 0, 0, 1, 4 * n)):
        columns = draws.reshape(-1, 4)
        assert columns.min() >= 0
        assert columns.max() < 1
        counts = np.histogram(columns, bins=64, range=(0, 1))[0]
        expected = columns.size / 64
        # χ² with 63 degrees of freedom: mean 63, std 11.2; five of them.
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.3
        correlation = np.corrcoef(columns.T) - np.eye(4)
        assert np.abs(correlation).max() < 5 / np.sqrt(n)
        assert abs(np.corrcoef(columns[1:, 0], columns[:-1, 0])[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stream": 2**32}, "stream"),
        ({"count": -1}, "count"),
        ({"start": 3}, "even"),
        ({"start": 2**33, "count": 2}, "2\\*\\*33"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniforms(**{"seed": 0, "epoch": 0, "sample": 0, "stream": 1, "count": 1, **arguments})


def test_words_are_all_bits_of_the_uniforms():
    bits = words(5, [0, 7], 3, 1, 6)
    np.testing.assert_array_equal((bits >> np.uint64(11)) * 2.0**-53, uniforms(5, [0, 7], 3, 1, 6))
    low = (bits & np.uint64(2**11 - 1)).ravel()
    assert len(set(low.tolist())) > 6  # the bits that a float has no room for are random too


def test_no_samples_draw_nothing():
    empty = np.zeros(0, np.int64)
    assert uniforms(0, empty, empty, 1, 5).shape == (0, 5)
