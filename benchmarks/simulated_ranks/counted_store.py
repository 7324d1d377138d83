"""A store that simulated ranks share in one process, with the number of their calls."""

from __future__ import annotations

import datetime
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch.distributed as dist

__all__ = ["CountedStore", "RankStore"]


class CountedStore:
    """Keys in memory. calls, keys_read, bytes_read: per rank; heartbeats, one per second and rank, are not counted.

    torch's own HashStore wakes every waiting thread at every write, which takes minutes with a thousand.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.written: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self.lock = threading.Lock()
        self.calls: Counter[int] = Counter()
        self.keys_read: Counter[int] = Counter()
        self.bytes_read: Counter[int] = Counter()

    def of(self, rank: int) -> RankStore:
        """Return the store as a rank sees it."""
        return RankStore(self, rank)

    def reset(self) -> None:
        """Count from zero."""
        for counts in (self.calls, self.keys_read, self.bytes_read):
            counts.clear()


class RankStore:
    """The methods of torch's stores that the engine calls."""

    def __init__(self, counted: CountedStore, rank: int) -> None:
        self._counted, self._rank = counted, rank

    def clone(self) -> RankStore:
        """Return a connection of its own."""
        return self

    def set(self, key: str, value: str) -> None:
        """Write one key."""
        self._write([key], [value], calls=key != f"iwm_fast/pulse/{self._rank}")

    def multi_set(self, keys: Sequence[str], values: Sequence[str]) -> None:
        """Write several keys."""
        self._write(keys, values, calls=1)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter."""
        with self._counted.lock:
            self._counted.calls[self._rank] += 1
            total = int(self._counted.values.get(key, b"0")) + amount
            self._counted.values[key] = str(total).encode()
            self._counted.written[key].set()
        return total

    def get(self, key: str) -> bytes:
        """Read one key."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Read several keys; waits for them, as torch's stores do."""
        for key in keys:
            self._event(key).wait()
        with self._counted.lock:
            found = [self._counted.values[key] for key in keys]
            self._counted.calls[self._rank] += 1
            self._counted.keys_read[self._rank] += len(keys)
            self._counted.bytes_read[self._rank] += sum(map(len, found))
        return found

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all are there."""
        with self._counted.lock:
            self._counted.calls[self._rank] += 1
            return all(key in self._counted.values for key in keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta) -> None:
        """Wait until all are there. Raises DistStoreError after the timeout, for the first that is not."""
        with self._counted.lock:
            self._counted.calls[self._rank] += 1
        for key in keys:
            if not self._event(key).wait(timeout.total_seconds()):
                raise dist.DistStoreError(f"timeout of {timeout} for {key}")

    def _write(self, keys: Sequence[str], values: Sequence[str], calls: int) -> None:
        with self._counted.lock:
            self._counted.calls[self._rank] += calls
            for key, value in zip(keys, values, strict=True):
                self._counted.values[key] = value.encode()
                self._counted.written[key].set()

    def _event(self, key: str) -> threading.Event:
        with self._counted.lock:
            return self._counted.written[key]
