"""The order of the samples of each epoch: a bijection of positions, keyed by (seed, epoch), in constant memory.

A Feistel network permutes the positions (Luby and Rackoff, "How to construct pseudorandom permutations from
pseudorandom functions", 1988). Black and Rogaway ("Ciphers with arbitrary finite domains", 2002) make it one of any
number n: a position is a pair (left, right) of numbers below a ≈ √n and b = ⌈n / a⌉, to each of which rounds add a
function of the other, modulo a or b; where the result is n or more, of which there are fewer than a, it is mapped again
("cycle walking").

So the sample at a position takes no list, and neither the epoch's length nor what was asked before counts. Runs that
began with an earlier version sort n random numbers instead (SORTED: 8 B per sample twice, and 180 ns per sample at each
beginning of an epoch); their checkpoints say so, and they finish in that order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from iwm_fast.data.randomness import ORDER, SHUFFLE, uniforms, words
from iwm_fast.errors import UserError

__all__ = [
    "FEISTEL",
    "ORDERS",
    "ROUNDS",
    "SHARDED",
    "SORTED",
    "SampleOrder",
    "permuted",
    "require_order",
    "shuffled",
    "sorted_order",
]

# Names of the orders, as checkpoints record them. A new rule is a new name. SHARDED is `shard_order`'s.
FEISTEL, SORTED, SHARDED = "feistel", "sorted", "sharded"
ORDERS = (FEISTEL, SORTED)

# 6 rounds leave some of the 120 orders of 5 samples twice as frequent as others, and 16 leave a bias of 0.1 % in those
# of 6; with 24 a chi-square test over 240,000 epochs finds none. At a million samples 8 would do.
ROUNDS = 24
# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
_MIX = ((np.uint64(32), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(29), np.uint64(0x94D049BB133111EB)))
_HALF = np.uint64(32)
# Positions at once: their temporaries stay in a core's cache, and NumPy's overhead per call is small beside them.
_BLOCK = 16384
# Random numbers of `sorted_order` at once.
_CHUNK = 32768

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]
Word = Words | np.uint64


def require_order(name: str, where: str) -> str:
    """Return the name of an order. UserError where this version has none of that name."""
    known = (*ORDERS, SHARDED)
    if name not in known:
        raise UserError(
            f"{where}: its samples come in the order {name!r}, which this version does not have ({', '.join(known)}); "
            "resume with the version that wrote it"
        )
    return name


def shuffled(seed: int, epoch: int, n: int, positions: Ids) -> Ids:
    """Return the samples at these positions in [0, n) of an epoch of n samples; both int64 (B,)."""
    rows = math.isqrt(n - 1) + 1 if n else 1
    size, columns = np.uint64(n), np.uint64(-(-n // rows))
    keys = words(seed, epoch, 0, SHUFFLE, ROUNDS)[0]
    found = np.empty(len(positions), np.uint64)
    for first in range(0, len(positions), _BLOCK):
        part = _encrypted(positions[first : first + _BLOCK].astype(np.uint64), keys, np.uint64(rows), columns)
        while len(beyond := np.flatnonzero(part >= size)):
            part[beyond] = _encrypted(part[beyond], keys, np.uint64(rows), columns)
        found[first : first + _BLOCK] = part
    return found.astype(np.int64)


def permuted(keys: Words, sizes: Ids, places: Ids) -> Ids:
    """Return for each of B places in [0, size) where another permutation of [0, size) has it: int64 (B,).

    keys: uint64 (ROUNDS, B), equal for the places of one permutation; sizes: int64 (B,), at most 2⁵².
    """
    limits = sizes.astype(np.uint64)
    rows = np.sqrt((sizes - 1).astype(np.float64)).astype(np.uint64) + np.uint64(1)
    columns = (limits + rows - np.uint64(1)) // rows
    found = _encrypted(places.astype(np.uint64), keys, rows, columns)
    while len(beyond := np.flatnonzero(found >= limits)):
        found[beyond] = _encrypted(found[beyond], keys[:, beyond], rows[beyond], columns[beyond])
    return found.astype(np.int64)


def _encrypted(values: Words, keys: Words, rows: Word, columns: Word) -> Words:
    """A bijection of [0, rows · columns); keys, rows and columns are one, or one per value."""
    left = values // columns
    right = values - left * columns
    for key in range(0, ROUNDS, 2):
        _add(left, right, keys[key], rows)
        _add(right, left, keys[key + 1], columns)
    left *= columns
    left += right
    return left


def _add(half: Words, other: Words, key: Word, size: Word) -> None:
    """Add to one half, in place, a keyed function of the other: below `size`, modulo `size`."""
    mixed = other + key
    for shift, factor in _MIX:
        mixed ^= mixed >> shift
        mixed *= factor
    mixed >>= _HALF
    mixed *= size  # a uniform number of 32 bits, scaled to below `size`
    mixed >>= _HALF
    half += mixed
    half -= (half >= size) * size


def sorted_order(seed: int, epoch: int, n: int) -> Ids:
    """Return n samples sorted by their random number, int64 (n,): the order of earlier versions, and of the images that
    an evaluation picks.
    """
    keys = np.empty(n)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        keys[start:stop] = uniforms(seed, epoch, 0, ORDER, stop - start, start=start)[0]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


class SampleOrder:
    """Sample ids and epochs by global position, for `count` samples. kind: one of ORDERS.

    Global position p is sample `shuffled(seed, p // count, count, p % count)` of epoch p // count. The last few
    thousand positions are kept, so that small batches do not compute one at a time.
    """

    def __init__(self, seed: int, count: int, kind: str = FEISTEL) -> None:
        if kind not in ORDERS:
            raise ValueError(f"kind is {kind!r}; it must be one of {ORDERS}")
        self.seed, self.count, self.kind = seed, count, kind
        self._span = count if kind == SORTED else min(count, _BLOCK)
        self._blocks: dict[tuple[int, int], Ids] = {}

    def __call__(self, start: int, stop: int) -> tuple[Ids, Ids]:
        """Return (ids, epochs) of the positions start to stop, int64 each."""
        ids, epochs = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        used: dict[tuple[int, int], Ids] = {}
        done = start
        while done < stop:
            epoch, place = divmod(done, self.count)
            block = place // self._span
            first = block * self._span
            samples = self._blocks[epoch, block] if (epoch, block) in self._blocks else self._block(epoch, first)
            used[epoch, block] = samples
            end = min(stop, done + len(samples) - (place - first))
            rows = slice(done - start, end - start)
            ids[rows] = samples[place - first : place - first + end - done]
            epochs[rows] = epoch
            done = end
        self._blocks = dict(list(used.items())[-2:])
        return ids, epochs

    def _block(self, epoch: int, first: int) -> Ids:
        if self.kind == SORTED:
            return sorted_order(self.seed, epoch, self.count)
        positions = np.arange(first, min(first + self._span, self.count), dtype=np.int64)
        return shuffled(self.seed, epoch, self.count, positions)
