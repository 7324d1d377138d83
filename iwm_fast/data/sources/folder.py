"""A folder of image files; sub-folders are classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.base import Labels, Unindexed, folder_labels
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.names import Names
from iwm_fast.data.sources.sorted_names import SortedNames
from iwm_fast.data.sources.storage import Storage

__all__ = ["FolderSource"]


class FolderSource(Unindexed):
    """Files of a storage, an image each, in the order given.

    Where images lie in sub-folders and there are at least two of these, the first folder of its path is an image's
    class, and what lies beside them has none.
    """

    kind = "folder"

    def __init__(self, storage: Storage, names: Sequence[str]) -> None:
        self.storage = storage
        self.left_out = LeftOut()
        self.names: Sequence[str] = names if isinstance(names, SortedNames) else Names.of(names)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, sample: int) -> str:
        """The file's path below the root."""
        return self.names[sample]

    def read(self, sample: int) -> bytes:
        """The file's bytes."""
        raw = self.storage.read(self.names[sample])
        if not raw:
            raise BadSample("the file is empty")
        return raw

    def size(self, sample: int) -> int:
        """The file's length."""
        return self.storage.size(self.names[sample])

    def extent(self, sample: int) -> tuple[str, int | None]:
        """The file, whole."""
        return self.names[sample], None

    @cached_property
    def labels(self) -> Labels:
        """By the first folder."""
        return folder_labels(list(self.names))

    def describe(self) -> str:
        """What these images come from."""
        return "an image folder"
