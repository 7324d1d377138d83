"""A source of the user's own: any object with `__len__` and `__getitem__`, registered under a name by a plugin."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from iwm_fast.config.plugins import load_plugins, loaded_plugins
from iwm_fast.config.registry import SOURCES
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.base import Labels, Unindexed, number_labels
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.storage import Storage
from iwm_fast.errors import UserError

__all__ = ["OwnSource", "register_source"]

T = TypeVar("T", bound=Callable[[str], Any])


def register_source(name: str) -> Callable[[T], T]:
    """Register the decorated class, or function, as ``data.source=NAME``.

    It is called with data.root and gives a data set: ``len(it)`` is the number of images, and ``it[i]`` is image i, or
    a tuple (image, label). An image is the bytes of a file, or a uint8 array (H, W) or (H, W, 3). `OwnSource` lists
    what the data set may have besides. UserError where the name is taken.
    """

    def registered(dataset: T) -> T:
        SOURCES.add(name, dataset)
        return dataset

    return registered


class OwnStorage:
    """What stands for the storage of a data set that is no files: it has no pieces, only a version."""

    readers = 1  # a data set need not be thread-safe; data.readers asks for more
    system_folders: tuple[str, ...] = ()
    repeated_folders: tuple[str, ...] = ()

    def __init__(self, root: str, kind: str, version: int | None) -> None:
        self.root = root
        self._kind, self._version = kind, version

    def shown(self, name: str) -> str:
        """The place and the sample's name."""
        return f"{self.root} [{self._kind}] {name}"

    def names(self) -> list[str]:
        """None: there are no files."""
        return []

    def walk(self) -> Iterator[str]:
        """None."""
        return iter(())

    def stamps(self, names: Sequence[str]) -> list[bytes | None]:
        """Unknown."""
        return [None] * len(names)

    def has(self, name: str) -> bool:  # noqa: ARG002  (a Storage's)
        """Never."""
        return False

    def size(self, name: str) -> int:  # noqa: ARG002
        """What stands for the version, by which cached features are found; each time another one without a version."""
        return int.from_bytes(os.urandom(7), "big") if self._version is None else self._version

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Of each name."""
        return [self.size(name) for name in names]

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:  # noqa: ARG002
        """BadSample: there are no files."""
        raise BadSample("the source has no files")

    def close(self) -> None:
        """Nothing is open."""


class OwnSource(Unindexed):
    """A data set of the user's own as a `Source`.

    Beside ``__len__`` and ``__getitem__`` it may have ``labels``, a number or text per image (without them every image
    is read once, when labels are first needed); ``name(i)``, the same for the same image in every run (default: i); and
    ``version``, a text that changes when the images do (without it features are not cached, and a resumed run cannot
    tell that images were replaced).
    """

    def __init__(self, kind: str, root: str) -> None:
        dataset = SOURCES.own(kind)
        if dataset is None:
            raise UserError(f"data.source is {kind}, and no plugin registers it; add its module to plugins")
        self.kind, self.left_out = kind, LeftOut()
        self._dataset = dataset(root)
        for method in ("__len__", "__getitem__"):
            if not hasattr(self._dataset, method):
                raise UserError(f"source {kind}: a {type(self._dataset).__name__} has no {method}; define it")
        version = getattr(self._dataset, "version", None)
        self._version = None if version is None else zlib.crc32(str(version).encode())
        self.storage: Storage = OwnStorage(root, kind, self._version)
        if not len(self):
            raise UserError(f"{root}: the source {kind} has no image")

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: it imports the plugins and opens the data set itself."""
        return _reopened, (loaded_plugins(), self.kind, self.storage.root)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, sample: int) -> str:
        """The data set's name for it, or its number."""
        named = getattr(self._dataset, "name", None)
        return str(named(sample)) if callable(named) else str(sample)

    def read(self, sample: int) -> bytes:
        """The image's bytes; an array as a PNM file. BadSample for an OSError of the data set's."""
        image = self._item(sample)[0]
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        return _pnm(image, f"source {self.kind}: image {self.name(sample)}")

    def size(self, sample: int) -> int:  # noqa: ARG002  (nothing is read for it)
        """What stands for the version, 0 without one: bytes would have to be read to be counted."""
        return self._version or 0

    def extent(self, sample: int) -> tuple[str, int | None]:
        """(one piece that stands for all, the sample's number)."""
        return "", sample

    @cached_property
    def labels(self) -> Labels:
        """Of the data set's ``labels``, or of its items."""
        given = getattr(self._dataset, "labels", None)
        if given is None:
            given = [self._item(sample)[1] for sample in range(len(self))]
        if len(given) != len(self):
            raise UserError(f"source {self.kind}: {len(given)} labels of {len(self)} images; give one per image")
        return number_labels(["" if label is None else str(label) for label in given])

    def describe(self) -> str:
        """What these images come from."""
        return f"the source {self.kind}"

    def _item(self, sample: int) -> tuple[Any, Any]:
        """(image, label or None)."""
        try:
            item = self._dataset[sample]
        except OSError as error:
            raise BadSample(f"{type(error).__name__}: {error}") from error
        if not isinstance(item, tuple):
            return item, None
        if len(item) != 2:
            raise UserError(f"source {self.kind}: image {sample} is a tuple of {len(item)}; give (image, label)")
        return item


def _pnm(image: Any, what: str) -> bytes:
    """A uint8 array as a PNM file, which holds its pixels as they are. UserError for anything else."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"{what} is a {type(image).__name__}; give the bytes of a file or a uint8 NumPy array")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise UserError(f"{what} is {image.dtype} {image.shape}; give uint8 (H, W) or (H, W, 3)")
    height, width = image.shape[:2]
    return b"P%d\n%d %d\n255\n" % (5 if image.ndim == 2 else 6, width, height) + image.tobytes()


def _reopened(plugins: tuple[str, ...], kind: str, root: str) -> OwnSource:
    load_plugins(plugins)
    return OwnSource(kind, root)
