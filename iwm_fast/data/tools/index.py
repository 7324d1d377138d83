"""Write the manifest of a source, which `sources.manifest` reads.

It is written to a temporary file, which is renamed when it is complete. A kill leaves that file, the beginning of the
manifest: the next run keeps its complete lines, if the listing is still the same, and continues after them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from iwm_fast.atomic_files import sync_open
from iwm_fast.data.decode.encoded import MAX_PIXELS, BadSample, inspect, upright_size
from iwm_fast.data.decode.verdicts import RULES
from iwm_fast.data.sources import Source, open_source
from iwm_fast.data.sources.base import UNLABELLED
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.kinds import MANIFEST_FILE, is_manifest
from iwm_fast.data.sources.manifest import BY_PILLOW, COLUMNS, Header, ManifestSource
from iwm_fast.data.sources.names import escape
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.split_layout import tell_of_splits
from iwm_fast.data.workers import Span, in_order
from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError, because
from iwm_fast.file_locks import hold
from iwm_fast.outputs import require_file

__all__ = ["write_index"]

_SPAN = 500  # samples per task of a process: 0.1 s of work, and a progress bar that moves
# Below this, starting processes (a second) takes longer than they save.
_WORTH_PROCESSES = 5000

_CHECKED = ("plain", "pillow", "bad")
TAB = "\t"
Progress = Callable[[str, int, int | None], None]


def write_index(
    root: str | Path,
    out: Path | None = None,
    *,
    source: str = "auto",
    check: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every image below `root` once and write its manifest to `out`, default `root`/iwm-fast-manifest.tsv.

    Returns {manifest, source, samples, bytes, classes, left_out, unreadable, resumed}: unreadable are the samples
    without a readable header (they are in the manifest, with 0 × 0 pixels), resumed the rows kept of a run that was
    killed.
    check: also check each image as a training does, and write the result; adds checked, {plain, pillow, bad}: images
    that DALI decodes, that Pillow decodes, and that neither does (or that have more than `MAX_PIXELS`).
    Raises UserError as `list_images`, and if `out` cannot be written or another process is writing it.
    """
    images = open_source(root, source, listed_anew=True)
    tell_of_splits(root, "they are indexed as classes, which no evaluation accepts")
    out = _place(images, out)
    require_file(out, "--out")
    names = [escape(images.name(i)) for i in range(len(images))]
    labels, classes = images.labels
    texts = [""] * len(names)
    if labels is not None:
        texts = ["" if label == UNLABELLED else escape(classes[label]) for label in labels.tolist()]
    header = Header(images.kind, _root_for(images.storage.root, out), len(images), classes, RULES if check else 0)
    beginning = f"{header.line()}\n{TAB.join(header.columns)}\n".encode("utf-8", "surrogateescape")
    try:
        with _beside(out) as file:
            kept = _keep(file, beginning, names, len(header.columns))
            totals = Counter(samples=len(kept), bytes=0, unreadable=0)
            for row in kept:
                totals.update(row.counts)
            spans = [(at, min(at + _SPAN, len(names))) for at in range(len(kept), len(names), _SPAN)]
            many = images.storage.readers == 1 and len(names) - len(kept) >= _WORTH_PROCESSES
            answers = in_order(_measure, (images, check), spans, (processes or usable_cores()) if many else 1)
            for (first, last), rows in zip(spans, answers, strict=True):
                for name, text, row in zip(names[first:last], texts[first:last], rows, strict=True):
                    file.write(row.line(name, text))
                    totals.update({"samples": 1, **row.counts})
                file.flush()
                if progress is not None:
                    progress("index", last, len(names))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'name another file with --out')}") from error
    ManifestSource(images.storage, LocalStorage(out.absolute().parent), out.name)  # writes its index
    checked = {word: totals.pop(word, 0) for word in _CHECKED}
    return {
        "manifest": str(out.absolute()),
        "source": images.describe(),
        "classes": len(classes),
        "resumed": len(kept),
        "left_out": images.left_out.rows(),
        **totals,
        **({"checked": checked} if check else {}),
    }


class _Row(NamedTuple):
    """Columns of a sample that reading gives, 0 if unreadable. check: the column, if it was checked."""

    size: int = 0
    width: int = 0
    height: int = 0
    crc: int = 0
    piece: str = ""
    offset: int | str = ""
    check: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """The row's share of the totals."""
        counts = {"bytes": self.size, "unreadable": int(not self.width)}
        if self.check is None:
            return counts
        return counts | {"bad" if not self.check else "pillow" if self.check == BY_PILLOW else "plain": 1}

    def line(self, name: str, label: str) -> bytes:
        """Return the row's line, in the order of COLUMNS."""
        words = [name, self.size, self.width, self.height, label, f"{self.crc:08x}", self.piece, self.offset]
        words += [] if self.check is None else [self.check]
        return (TAB.join(map(str, words)) + "\n").encode("utf-8", "surrogateescape")


def _measure(given: tuple[Source, bool], span: Span) -> list[_Row]:
    """Read the samples of a span; several at a time if each read is a request."""
    images, check = given
    if images.storage.readers == 1:
        return [_row(images, sample, check=check) for sample in range(*span)]
    with ThreadPoolExecutor(images.storage.readers) as pool:
        return list(pool.map(partial(_row, images, check=check), range(*span)))


def _row(images: Source, sample: int, *, check: bool) -> _Row:
    try:
        raw = images.read(sample)
        piece, offset = images.extent(sample)
    except BadSample:
        nothing = _Row(check=0 if check else None)
        return nothing if images.kind == "folder" else nothing._replace(piece=escape(_piece(images, sample)), offset=0)
    try:
        width, height = upright_size(raw)
    except BadSample:
        width, height = 0, 0
    row = _Row(len(raw), width, height, crc32c(raw), check=_checked(raw) if check else None)
    return row if offset is None else row._replace(piece=escape(piece), offset=offset)


def _checked(raw: bytes) -> int:
    """Return the column "check"; images for Pillow are decoded."""
    try:
        encoded = inspect(raw, MAX_PIXELS)
    except BadSample:
        return 0
    return BY_PILLOW if encoded.lossless else encoded.orientation


def _piece(images: Source, sample: int) -> str:
    """Return the file of an unreadable sample, without TFRecord's `extent`, which would read it."""
    return images.name(sample).rpartition(":")[0] if images.kind == "tfrecord" else images.extent(sample)[0]


def _place(images: Source, out: Path | None) -> Path:
    if out is None and is_address(images.storage.root):
        raise UserError(f"{images.storage.root} is an object store: name a local file for the manifest with --out")
    out = Path(images.storage.root) / MANIFEST_FILE if out is None else out
    if out.is_dir():
        out /= MANIFEST_FILE
    if not is_manifest(out.name):
        raise UserError(f"{out}: a manifest's name ends in .tsv; name another --out")
    return out


def _root_for(root: str, out: Path) -> str:
    """Return the manifest's field root: relative if the manifest is in the root itself, so that both can move."""
    return "." if not is_address(root) and out.absolute().parent.resolve() == Path(root).resolve() else root


@contextmanager
def _beside(out: Path) -> Iterator[BinaryIO]:
    """Yield the locked file that becomes `out` when the block succeeds; it has the rows of a killed run."""
    partial_file = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_file.open("a+b") as file:
        try:
            hold(file, str(out))
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is writing it; wait for it") from error
        yield file
        file.flush()
        sync_open(file.fileno())
        partial_file.replace(out)
        os.utime(out)  # renaming changed the folder's time; the manifest must not look older than its folder


def _keep(file: BinaryIO, beginning: bytes, names: list[str], columns: int) -> list[_Row]:
    """Return the rows of a killed run that are still valid, with what is counted of them; truncate the rest."""
    file.seek(0)
    kept: list[_Row] = []
    end = 0
    if file.read(len(beginning)) == beginning:
        end = len(beginning)
        for line, name in zip(file, names, strict=False):
            words = line.decode("utf-8", "surrogateescape").split(TAB)
            if not line.endswith(b"\n") or len(words) != columns or words[0] != name:
                break
            kept.append(_Row(int(words[1]), int(words[2]), check=int(words[-1]) if columns > len(COLUMNS) else None))
            end += len(line)
    file.truncate(end)
    if not end:
        file.write(beginning)
    return kept
