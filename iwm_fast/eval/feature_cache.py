"""Features kept on disk: computed once for an encoder and a set of images, then mapped into memory and read again.

An entry is a folder CACHE/KEY with ``values.npy``, ``labels.npy`` and ``entry.json``. Its name is a digest of all that
the features depend on: the encoder's weights and shape, the images (path, size, times of change), what is kept of their
tokens, and this format. So another checkpoint, or an image that was replaced, never gets an older entry. What was left
out because it cannot be used stands in ``entry.json`` with the reasons. A folder appears whole or not at all; one that
was damaged later is computed anew. All of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from iwm_fast.atomic_files import sync
from iwm_fast.errors import UserError

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
        """Copies of the given rows."""
        return Features(self.values[rows], self.labels[rows], self.left_out)


class Room:
    """Arrays to be filled from the top; ``count`` rows of them hold something. ``left_out``: as of `Features`."""

    def __init__(self, values: NDArray[Any], labels: NDArray[Any], *, kept: bool = True) -> None:
        self.values = values
        self.labels = labels
        self.kept = kept  # on the disk, not in memory alone
        self.count = 0
        self.left_out: dict[str, str] = {}

    def add(self, values: NDArray[Any], labels: NDArray[Any]) -> None:
        """Write the next rows."""
        end = self.count + len(values)
        self.values[self.count : end] = values
        self.labels[self.count : end] = labels
        self.count = end

    def features(self) -> Features:
        """What was written."""
        return Features(self.values[: self.count], self.labels[: self.count], self.left_out)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Entries below a folder, which is made when the first one is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._said = False

    def find(self, key: Mapping[str, Any]) -> Features | None:
        """The entry of ``key``, mapped into memory; None where there is none, or not a whole one."""
        folder = self.root / _name(key)
        try:
            entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
            count, left_out = entry["count"], dict(entry["left_out"])
            values, labels = (np.load(folder / file, mmap_mode="r") for file in (_VALUES, _LABELS))
        except (OSError, ValueError, KeyError, TypeError):  # absent, torn, or no longer what was written
            return None
        whole = isinstance(count, int) and 0 < count <= min(len(values), len(labels))
        return Features(values[:count], labels[:count], left_out) if whole else None

    @contextmanager
    def filling(
        self,
        key: Mapping[str, Any],
        values: tuple[tuple[int, ...], DTypeLike],
        labels: tuple[tuple[int, ...], DTypeLike],
    ) -> Iterator[Room]:
        """Room for an entry (shape and type of each array), which others see when the block ends without an error.

        Where they cannot be kept (a full disk, a folder that one may only read), that is said once and they lie in
        memory. UserError where neither the disk nor the memory has room for them.
        """
        folder = self.root / _name(key)
        partial = self.root / f".{folder.name}.{os.getpid()}.partial"
        try:
            room = self._begin(partial, values, labels)
            yield room
            if room.kept:
                try:
                    self._publish(partial, folder, {"key": key, "count": room.count, "left_out": room.left_out})
                except OSError as error:  # the arrays stay mapped, whatever becomes of their names
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
            free = shutil.disk_usage(self.root).free
            if needed <= free:
                return Room(*(_mapped(partial / file, *what) for file, what in ((_VALUES, values), (_LABELS, labels))))
            why = f"they take {_size(needed)} and {_size(free)} are free"
        except OSError as error:
            why = error.strerror or str(error)
        available = _memory_available()
        if needed > available:
            raise UserError(
                f"{self.root}: the features cannot be kept there ({why}), and they take {_size(needed)} where "
                f"{_size(available)} of memory are free; name another --cache, or use fewer images"
            )
        self._say(why)
        return Room(np.empty(*values), np.empty(*labels), kept=False)

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            line = f"{self.root}: features are not kept ({why}): measured all the same, and read anew next time"
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
    """A new file as an array. Its blocks are taken at once: a disk that fills up later would end the process by a
    signal when the array is written.
    """
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _memory_available() -> int:
    """Bytes that the system can give without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _name(key: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
