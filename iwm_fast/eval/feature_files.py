"""A file of features: Parquet, written in row groups as they come, or .npz, in memory until it is written.

| column of Parquet | array of .npz | |
|---|---|---|
| key: string | key: str (n,) | the image's name below the folder that was read |
| split: string | split: str (n,) | the folder of its split, where the data have such folders; null or "" beside them |
| label: int64, null without a class | label: int64 (n,), -1 without a class | its class, where images have such |
| class: string | classes: str (C,), by label | its class by name |
| feature: float32 list of D, or of L lists of D | feature: float32 (n, D) or (n, L, D) | |

A JSON document says the rest: in Parquet under the key ``iwm_fast`` of the file's metadata, in .npz as ``metadata``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from iwm_fast.errors import UserError
from iwm_fast.file_names import valid_unicode

__all__ = ["METADATA_KEY", "SUFFIXES", "FeatureFile", "Rows", "Table", "feature_file", "require_suffix"]

METADATA_KEY = b"iwm_fast"
SUFFIXES = (".parquet", ".npz")
# Per row group: what is in memory at once, and what a reader must read at once.
_GROUP_BYTES = 32 * 2**20
_GROUP_ROWS = 65536


@dataclass(frozen=True)
class Table:
    """The contents of a file. total: images at most; shape: of one feature; classes: by label, () without;
    splits: whether each image has a split.
    """

    total: int
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    splits: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one feature, float32."""
        return 4 * int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Rows:
    """Some images: keys, features float32 (b, …), labels int64 (b,) with -1 for none, splits with "" for none."""

    keys: Sequence[str]
    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None = None
    splits: Sequence[str] | None = None


class FeatureFile(Protocol):
    """A file being written."""

    def add(self, rows: Rows) -> None:
        """Append images."""
        ...

    def finish(self, metadata: str) -> None:
        """Write the rest, and the JSON that describes the file."""
        ...


def require_suffix(out: Path) -> None:
    """Raise UserError if the name of ``out`` has no known suffix, or one whose library is not installed."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: unknown format; give a file that ends in .parquet or .npz")
    if out.suffix == ".parquet":
        _pyarrow(out)


@contextmanager
def feature_file(kind: str, file: BinaryIO, table: Table) -> Iterator[FeatureFile]:
    """Yield a writer of ``kind`` (".parquet" or ".npz") to an open file. Raise UserError if an .npz exceeds memory."""
    if kind == ".npz":
        yield _Npz(file, table)
        return
    writer = _Parquet(file, table)
    try:
        yield writer
    except BaseException:
        with suppress(OSError):  # of a full disk; what is written goes away
            writer.close()
        raise


def _pyarrow(out: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--out: {out}: Parquet is written by pyarrow: pip install 'iwm-fast[parquet]', or name a file that ends "
            "in .npz"
        ) from error
    return pyarrow


class _Parquet:
    """Row groups of at most 32 MiB of features."""

    def __init__(self, file: BinaryIO, table: Table) -> None:
        self._arrow = arrow = _pyarrow(Path("FEATURES.parquet"))
        kind = arrow.float32()
        for size in reversed(table.shape):
            kind = arrow.list_(kind, size)
        columns = [("key", arrow.string())]
        columns += [("split", arrow.string())] if table.splits else []
        columns += [("label", arrow.int64()), ("class", arrow.string())] if table.classes else []
        self._schema = arrow.schema([*columns, ("feature", kind)])
        words = [name for name, _ in columns if name in ("split", "class")]
        self._writer = arrow.parquet.ParquetWriter(file, self._schema, use_dictionary=words)
        self._classes = arrow.array([*map(valid_unicode, table.classes)], arrow.string())
        self._group = min(_GROUP_ROWS, max(1, _GROUP_BYTES // table.row_bytes))
        self._held: list[Any] = []
        self._count = 0

    def add(self, rows: Rows) -> None:
        """Append images; a row group is written when it is full."""
        arrow = self._arrow
        found: dict[str, Any] = {"key": arrow.array([*map(valid_unicode, rows.keys)], arrow.string())}
        if rows.splits is not None:
            found["split"] = arrow.array([valid_unicode(one) or None for one in rows.splits], arrow.string())
        if rows.labels is not None:
            found["label"] = arrow.array(rows.labels, mask=rows.labels < 0)
            found["class"] = self._classes.take(found["label"])
        feature = arrow.array(np.ascontiguousarray(rows.features, np.float32).reshape(-1))
        for size in reversed(rows.features.shape[1:]):
            feature = arrow.FixedSizeListArray.from_arrays(feature, size)
        found["feature"] = feature
        self._held.append(arrow.table([found[name] for name in self._schema.names], schema=self._schema))
        self._count += len(rows.keys)
        if self._count >= self._group:
            self._flush()

    def finish(self, metadata: str) -> None:
        """Write the last row group and the metadata."""
        self._flush()
        self._writer.add_key_value_metadata({METADATA_KEY: metadata.encode()})
        self.close()

    def close(self) -> None:
        """Write the file's end."""
        self._writer.close()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(self._arrow.concat_tables(self._held), row_group_size=self._group)
        self._held, self._count = [], 0


@dataclass
class _Columns:
    keys: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)


class _Npz:
    """Arrays in memory, written at the end."""

    def __init__(self, file: BinaryIO, table: Table) -> None:
        needed, free = table.total * table.row_bytes, _memory_available()
        if needed > free:
            raise UserError(
                f"--out: an .npz file is in memory until it is written: {table.total} features need "
                f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; give a file that ends in .parquet"
            )
        self._file, self._table = file, table
        self._features = np.empty((table.total, *table.shape), np.float32)
        self._columns = _Columns()

    def add(self, rows: Rows) -> None:
        """Append images."""
        first = len(self._columns.keys)
        self._features[first : first + len(rows.keys)] = rows.features
        self._columns.keys.extend(map(valid_unicode, rows.keys))
        if rows.splits is not None:
            self._columns.splits.extend(map(valid_unicode, rows.splits))
        if rows.labels is not None:
            self._columns.labels.append(rows.labels)

    def finish(self, metadata: str) -> None:
        """Write everything."""
        columns = self._columns
        arrays: dict[str, Any] = {"key": np.array(columns.keys, str)}
        if self._table.splits:
            arrays["split"] = np.array(columns.splits, str)
        if self._table.classes:
            arrays["label"] = np.concatenate([np.zeros(0, np.int64), *columns.labels])
            arrays["classes"] = np.array([*map(valid_unicode, self._table.classes)], str)
        feature = self._features[: len(columns.keys)]
        np.savez(self._file, **arrays, feature=feature, metadata=np.array(metadata))


def _memory_available() -> int:
    """Return the bytes that the system can give without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
