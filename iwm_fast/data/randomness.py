"""Counter-based random numbers: a sample's numbers are a function of (seed, epoch, sample id, stream) alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11), vectorised in NumPy and checked
against the known answers of Random123. It has no state, so batch size, ranks, workers and resuming change no number.

Seed, epoch and sample id are 64 bits each, more than key and counter (64 + 128 bits) hold beside a stream and an index.
So Philox runs twice: with the seed as key and (epoch, sample) as counter it is a bijection of (epoch, sample); half of
its 128 output bits are the key of the second run, half stand in its counter beside (index, stream). So no two samples
of a seed share an input of the second run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BANK",
    "COMPRESSION",
    "MASKS",
    "ORDER",
    "REPLACEMENT",
    "SHARDS",
    "SHUFFLE",
    "SOURCE_GEOMETRY",
    "VIEWS",
    "WINDOWS",
    "philox",
    "uniforms",
    "words",
]

# One stream per purpose, so that more numbers for one never change another. The values are part of a run's identity.
VIEWS = 1
SOURCE_GEOMETRY = 2
MASKS = 3
ORDER = 4
BANK = 5
REPLACEMENT = 6
COMPRESSION = 7
SHUFFLE = 8
SHARDS = 9
WINDOWS = 10

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: map four counter words and two key words to four words, each < 2³² in uint64 arrays that
    broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _halves(values: Words) -> tuple[Words, Words]:
    """Low and high 32 bits."""
    return values & _LOW, values >> _HALF


def words(
    seed: int, epoch: ArrayLike, sample: ArrayLike, stream: int, count: int, *, start: int = 0
) -> NDArray[np.uint64]:
    """Return numbers `start` to `start + count` of a stream, for B samples: uint64 (B, count), 64 random bits each.

    epoch and sample: int64 (B,), or scalars that broadcast; seed in [0, 2⁶⁴); stream in [0, 2³²); start even, since a
    Philox block gives two numbers. Raises ValueError otherwise.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be in [0, 2**64)")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream is {stream}; it must be in [0, 2**32)")
    if count < 0 or start < 0 or start % 2:
        raise ValueError(f"count is {count} and start {start}; both must be 0 or more, and start even")
    epochs, samples = np.broadcast_arrays(
        np.atleast_1d(np.asarray(epoch, np.int64)), np.atleast_1d(np.asarray(sample, np.int64))
    )
    key = _halves(np.array(seed, np.uint64))
    # A cast of int64 to uint64 keeps the bits, so negative ids have their own numbers.
    name = philox((*_halves(epochs.astype(np.uint64)), *_halves(samples.astype(np.uint64))), key)
    n0, n1, n2, n3 = (word[:, None] for word in name)
    block = np.arange(start // 2, start // 2 + (count + 1) // 2, dtype=np.uint64)
    if len(block) and block[-1] > _LOW:
        raise ValueError(f"start + count is {start + count}; a stream has 2**33 numbers")
    w0, w1, w2, w3 = philox((block[None, :], np.array(stream, np.uint64), n2, n3), (n0, n1))
    bits = np.empty((len(epochs), len(block), 2), np.uint64)
    np.bitwise_or(w0 << _HALF, w1, out=bits[:, :, 0])
    np.bitwise_or(w2 << _HALF, w3, out=bits[:, :, 1])
    return bits.reshape(len(epochs), 2 * len(block))[:, :count]


def uniforms(
    seed: int, epoch: ArrayLike, sample: ArrayLike, stream: int, count: int, *, start: int = 0
) -> NDArray[np.float64]:
    """Return the numbers of `words` as float64 (B, count) in [0, 1), 53 random bits each."""
    bits = words(seed, epoch, sample, stream, count, start=start)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
