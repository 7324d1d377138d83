"""Features kept on disk: computed once for an encoder and a set of images, then mapped into memory and read again.

An entry is a folder CACHE/KEY with ``values.npy``, ``labels.npy`` and ``entry.json``. Its name is a digest of all that
the features depend on: the encoder's weights and shape, the images (path, size, time of change), what is kept of their
tokens, and this format. So another checkpoint, or an image that was replaced, never gets an older entry. A folder
appears whole or not at all; one that was damaged later is computed anew. All of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import nn

from iwm_fast.data.whole import sync
from iwm_fast.errors import UserError

__all__ = ["FeatureCache", "Features", "Room", "sync", "weights_digest"]

FORMAT = 1
_VALUES, _LABELS, _ENTRY = "values.npy", "labels.npy", "entry.json"


@dataclass(frozen=True, eq=False)
class Features:
    """values (n, …) and what belongs to each row: labels int64 (n,), or masks uint8 (n, S, S). Both may be mapped."""

    values: NDArray[Any]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Copies of the given rows."""
        return Features(self.values[rows], self.labels[rows])


class Room:
    """Arrays to be filled from the top; ``count`` rows of them hold something."""

    def __init__(self, values: NDArray[Any], labels: NDArray[Any]) -> None:
        self.values = values
        self.labels = labels
        self.count = 0

    def add(self, values: NDArray[Any], labels: NDArray[Any]) -> None:
        """Write the next rows."""
        end = self.count + len(values)
        self.values[self.count : end] = values
        self.labels[self.count : end] = labels
        self.count = end

    def features(self) -> Features:
        """What was written."""
        return Features(self.values[: self.count], self.labels[: self.count])


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

    def find(self, key: Mapping[str, Any]) -> Features | None:
        """The entry of ``key``, mapped into memory; None where there is none, or not a whole one."""
        folder = self.root / _name(key)
        try:
            count = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))["count"]
            values, labels = (np.load(folder / file, mmap_mode="r") for file in (_VALUES, _LABELS))
        except (OSError, ValueError, KeyError, TypeError):  # absent, torn, or no longer what was written
            return None
        whole = isinstance(count, int) and 0 < count <= min(len(values), len(labels))
        return Features(values[:count], labels[:count]) if whole else None

    @contextmanager
    def filling(
        self,
        key: Mapping[str, Any],
        values: tuple[tuple[int, ...], DTypeLike],
        labels: tuple[tuple[int, ...], DTypeLike],
    ) -> Iterator[Room]:
        """Room for an entry (shape and type of each array), which others see when the block ends without an error.

        UserError where the folder cannot be written or the disk has too little room.
        """
        folder = self.root / _name(key)
        partial = self.root / f".{folder.name}.{os.getpid()}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._require_room(sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in (values, labels)))
            room = Room(
                *(
                    np.lib.format.open_memmap(partial / file, mode="w+", dtype=kind, shape=shape)
                    for file, (shape, kind) in ((_VALUES, values), (_LABELS, labels))
                )
            )
            yield room
            self._publish(partial, folder, {"key": key, "count": room.count})
        except OSError as error:
            raise UserError(
                f"{self.root}: features cannot be kept there ({error.strerror or error}); name another --cache"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _require_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise UserError(
                f"{self.root}: the features take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                "name another --cache, or use fewer images"
            )

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


def _name(key: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
