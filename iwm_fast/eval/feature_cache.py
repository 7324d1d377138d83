"""Features cached on disk: computed once per encoder and set of images, then memory-mapped.

An entry is a folder CACHE/KEY with ``values.npy``, ``labels.npy`` and ``entry.json``. KEY is a digest of everything
that the features depend on: the encoder's weights and shape, the images (path, size, times of change), their pooling,
and this format. So another checkpoint, or a replaced image, never gets an older entry. ``entry.json`` also lists images
that were left out, with reasons. Entries are written atomically; a damaged one is recomputed. The folder holds at most
`FeatureCache.limit` bytes: what would exceed it is in memory. Nothing is removed; the cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from iwm_fast.atomic_files import sync
from iwm_fast.eval.defaults import CACHE_LIMIT_GB
from iwm_fast.eval.registry import CannotRunError

__all__ = ["FeatureCache", "Features", "Room", "sync", "weights_digest"]

FORMAT = 1
_VALUES, _LABELS, _ENTRY = "values.npy", "labels.npy", "entry.json"


@dataclass(frozen=True, eq=False)
class Features:
    """values (n, …) and what belongs to each row: labels int64 (n,), or masks uint8 (n, S, S). Both may be mapped.

    left_out: why what is missing of the images cannot be used, by file.
    """

    values: NDArray[Any]
    labels: NDArray[Any]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Return copies of the given rows."""
        return Features(self.values[rows], self.labels[rows], self.left_out)


class Room:
    """Arrays to fill from the top; ``count`` rows are filled. ``left_out``: as in `Features`."""

    def __init__(self, values: NDArray[Any], labels: NDArray[Any], *, kept: bool = True) -> None:
        self.values = values
        self.labels = labels
        self.kept = kept  # on disk, not only in memory
        self.count = 0
        self.left_out: dict[str, str] = {}

    def add(self, values: NDArray[Any], labels: NDArray[Any]) -> None:
        """Write the next rows."""
        end = self.count + len(values)
        self.values[self.count : end] = values
        self.labels[self.count : end] = labels
        self.count = end

    def features(self) -> Features:
        """Return what was written."""
        return Features(self.values[: self.count], self.labels[: self.count], self.left_out)


def weights_digest(module: nn.Module) -> str:
    """Return SHA-256 of names, shapes, dtypes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Entries below a folder, which the first entry creates. limit: bytes that the folder may hold, 10⁹ to a GB."""

    def __init__(self, root: Path, limit_gb: float = CACHE_LIMIT_GB) -> None:
        self.root = root
        self.limit = int(limit_gb * 1e9)
        self._said = False
        self._no_room: str | None = None  # for the entries that were announced last

    def find(self, key: Mapping[str, Any]) -> Features | None:
        """Return the entry of ``key``, memory-mapped; None if it is missing or incomplete."""
        folder = self.root / _name(key)
        try:
            entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            count, left_out = entry["count"], dict(entry["left_out"])
            values, labels = (np.load(folder / file, mmap_mode="r") for file in (_VALUES, _LABELS))
        except (OSError, ValueError, KeyError, TypeError):  # missing, torn or changed
            return None
        whole = isinstance(count, int) and 0 < count <= min(len(values), len(labels))
        return Features(values[:count], labels[:count], left_out) if whole else None

    def announce(self, what: str, needed: int) -> None:
        """Say how many bytes the next entries take and where, or why they are not cached.

        Raise CannotRunError if neither the disk nor the memory has room for all of them.
        """
        self._no_room = self._why_not(needed)
        if self._no_room is None:
            held = _held(self.root)
            beside = f" beside {_size(held)}" if held else ""
            line = f"{self.root}: {_size(needed)} of {what} are cached here{beside}; --cache-limit: {_size(self.limit)}"
            print(line, file=sys.stderr, flush=True)
        else:
            self._require_memory(needed, self._no_room)
            self._say(self._no_room)

    @contextmanager
    def filling(
        self,
        key: Mapping[str, Any],
        values: tuple[tuple[int, ...], DTypeLike],
        labels: tuple[tuple[int, ...], DTypeLike],
    ) -> Iterator[Room]:
        """Yield room for an entry (shape and dtype of each array), published when the block ends without an error.

        If it cannot be cached (the limit, a full disk, a read-only folder), this is said once and the arrays are in
        memory. Raise CannotRunError if neither the disk nor the memory has room for them.
        """
        folder = self.root / _name(key)
        partial = self.root / f".{folder.name}.{os.getpid()}.partial"
        try:
            room = self._begin(partial, values, labels)
            yield room
            if room.kept:
                try:
                    self._publish(partial, folder, {"key": key, "count": room.count, "left_out": room.left_out})
                except OSError as error:  # the arrays stay mapped, even if their names are lost
                    self._say(error.strerror or str(error))
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _begin(
        self, partial: Path, values: tuple[tuple[int, ...], DTypeLike], labels: tuple[tuple[int, ...], DTypeLike]
    ) -> Room:
        needed = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in (values, labels))
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            why = self._no_room or self._why_not(needed)
            if why is None:
                return Room(*(_mapped(partial / file, *what) for file, what in ((_VALUES, values), (_LABELS, labels))))
        except OSError as error:
            why = error.strerror or str(error)
        self._require_memory(needed, why)
        self._say(why)
        return Room(np.empty(*values), np.empty(*labels), kept=False)

    def _why_not(self, needed: int) -> str | None:
        """Return why so many bytes cannot be added, or None."""
        held = _held(self.root)
        if held + needed > self.limit:
            there = f" and {_size(held)} are there" if held else ""
            return f"they need {_size(needed)}{there}, --cache-limit is {_size(self.limit)}"
        place = next((folder for folder in (self.root, *self.root.absolute().parents) if folder.is_dir()), None)
        free = needed if place is None else shutil.disk_usage(place).free
        return None if needed <= free else f"they need {_size(needed)}, {_size(free)} are free"

    def _require_memory(self, needed: int, why: str) -> None:
        available = _memory_available()
        if needed > available:
            raise CannotRunError(
                f"{self.root}: the features cannot be cached there ({why}) and do not fit in memory either: they need "
                f"{_size(needed)}, {_size(available)} are free; give a larger --cache-limit, another --cache, or data "
                "with fewer images"
            )

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            line = f"{self.root}: features are not cached ({why}); they are in memory, and recomputed next time"
            print(line, file=sys.stderr, flush=True)

    def _publish(self, partial: Path, folder: Path, entry: dict[str, Any]) -> None:
        (partial / _ENTRY).write_text(json.dumps(entry, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():
            if self.find(entry["key"]) is not None:  # another process was faster
                return
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(self.root)


def _mapped(path: Path, shape: tuple[int, ...], kind: DTypeLike) -> NDArray[Any]:
    """Create a file as an array. Its blocks are allocated at once: if the disk filled up later, writing to the array
    would end the process by a signal.
    """
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _memory_available() -> int:
    """Return the bytes that the system can give without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _held(root: Path) -> int:
    """Return the bytes of all entries, of those being written too."""
    total = 0
    for path in root.glob("*/*"):
        with suppress(OSError):  # another process has removed it
            total += path.stat().st_size
    return total


def _name(key: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
