"""Write the manifest of a source, which `sources.manifest` reads.

It is written to a temporary file, which is renamed when it is complete (`known_rows` reads what a killed run left of
it, and the manifest that was there before). Names are listed, sorted and written in memory that does not grow with
their number, where they are files of a folder or objects of an object store.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from iwm_fast.data.decode.encoded import MAX_PIXELS, BadSample, inspect, upright_size
from iwm_fast.data.decode.verdicts import RULES
from iwm_fast.data.sources import Source, open_source
from iwm_fast.data.sources.base import UNLABELLED, folder_classes, top_folder
from iwm_fast.data.sources.checksum import crc32c
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.kinds import MANIFEST_FILE, is_manifest
from iwm_fast.data.sources.manifest import BY_PILLOW, COLUMNS, Header, ManifestSource
from iwm_fast.data.sources.names import escape
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.data.sources.sorted_names import SortedNames
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.data.split_layout import tell_of_splits
from iwm_fast.data.tools.known_rows import Known, KnownRows
from iwm_fast.data.tools.manifest_files import ManifestFiles, writing_manifest
from iwm_fast.data.workers import in_order
from iwm_fast.environment import usable_cores
from iwm_fast.errors import UserError, because
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
    """Read the images below `root` and write their manifest to `out`, default `root`/iwm-fast-manifest.tsv.

    An image is not read again if a killed run, or the manifest that was there, has its row and its file has not changed
    since. Returns {manifest, source, samples, bytes, classes, left_out, unreadable, resumed, unchanged}: unreadable are
    the samples without a readable header (they are in the manifest, with 0 × 0 pixels), resumed the rows of a run that
    was killed, unchanged those of the manifest that was there.
    check: also check each image as a training does, and write the result; adds checked, {plain, pillow, bad}: images
    that DALI decodes, that Pillow decodes, and that neither does (or that have more than `MAX_PIXELS`).
    Raises UserError as `list_images`, and if `out` cannot be written or another process is writing it.
    """
    out = _place(root, out)
    tell = None if progress is None else partial(_tell_listed, progress)
    try:
        images = open_source(root, source, listed_anew=lambda names: SortedNames(names, _present(out.parent), tell))
        tell_of_splits(root, "they are indexed as classes, which no evaluation accepts")
        require_file(out, "--out")
        classes, texts = _labels(images)
        header = Header(images.kind, _root_for(images.storage.root, out), len(images), classes, RULES if check else 0)
        many = images.storage.readers == 1 and len(images) >= _WORTH_PROCESSES
        with writing_manifest(out) as files:
            totals = _write_rows(images, texts, header, files, (processes or usable_cores()) if many else 1, progress)
    except OSError as error:
        file = error.filename2 or error.filename  # of a renaming the new name
        at = f"{file}: " if file and Path(file).name != out.name else ""
        reason = because(error, "name another file with --out")
        raise UserError(f"{out}: cannot be written: {at}{reason}") from error
    ManifestSource(images.storage, LocalStorage(out.absolute().parent), out.name)  # writes its index
    checked = {word: totals.pop(word, 0) for word in _CHECKED}
    return {
        "manifest": str(out.absolute()),
        "source": images.describe(),
        "classes": len(classes),
        "left_out": images.left_out.rows(),
        **totals,
        **({"checked": checked} if check else {}),
    }


def _tell_listed(progress: Progress, count: int) -> None:
    progress("list", count, None)


def _labels(images: Source) -> tuple[tuple[str, ...], Callable[[int, str], str]]:
    """(names of the classes, the column "label" of a sample of this number and name)."""
    if isinstance(images, FolderSource):
        classes = folder_classes(images.names)
        return classes, lambda _, name: escape(top_folder(name)) if classes else ""
    labels, classes = images.labels
    if labels is None:
        return classes, lambda _sample, _name: ""
    return classes, lambda sample, _: "" if labels[sample] == UNLABELLED else escape(classes[labels[sample]])


class _Part(NamedTuple):
    """Samples whose rows are wanted, and what is known of each. names: of files; else `first` is the first of them."""

    first: int
    names: list[str] | None
    known: list[Known | None]


def _write_rows(
    images: Source,
    label: Callable[[int, str], str],
    header: Header,
    files: ManifestFiles,
    processes: int,
    progress: Progress | None,
) -> Counter[str]:
    """Write all rows; return the totals."""
    beginning = f"{header.line()}\n{TAB.join(header.columns)}\n".encode("utf-8", "surrogateescape")
    files.begin(beginning)
    known = KnownRows(files.earlier, header)
    given = (FolderSource(images.storage, []) if isinstance(images, FolderSource) else images, bool(header.check))
    waiting: deque[tuple[_Part, list[str]]] = deque()
    totals = Counter(samples=0, bytes=0, unreadable=0, resumed=0, unchanged=0)

    def parts() -> Iterator[_Part]:
        for first, names in _spans(images):
            own = names if isinstance(images, FolderSource) else None
            pieces = names if own else [_piece(images, sample) for sample in range(first, first + len(names))]
            part = _Part(first, own, list(map(known.take, names, pieces)))
            waiting.append((part, names))
            yield part

    for answers in in_order(_measure, given, parts(), processes):
        part, names = waiting.popleft()
        rows = []
        for sample, (name, before, (new, stamp)) in enumerate(zip(names, part.known, answers, strict=True), part.first):
            row = new
            if row is None:
                assert before is not None
                row = _Row.of(before, checked=bool(header.check))
                totals["unchanged" if before.manifest == files.out else "resumed"] += 1
            files.write(row.line(escape(name), label(sample, name)), stamp)
            rows.append(row)
        totals.update(_totals(rows))
        files.flush(known.passed)
        if progress is not None:
            progress("index", part.first + len(names), len(images))
    return totals


def _spans(images: Source) -> Iterator[tuple[int, list[str]]]:
    """(number of the first sample, names) of spans of all samples."""
    names = iter(images.names) if isinstance(images, FolderSource) else map(images.name, range(len(images)))
    for first in range(0, len(images), _SPAN):
        yield first, list(islice(names, _SPAN))


class _Row(NamedTuple):
    """Columns of a sample that reading gives, 0 if unreadable. check: the column, if it was checked."""

    size: int = 0
    width: int = 0
    height: int = 0
    crc: int = 0
    piece: str = ""
    offset: int | str = ""
    check: int | None = None

    @classmethod
    def of(cls, known: Known, *, checked: bool) -> _Row:
        """An earlier row."""
        words = known.line[:-1].decode("utf-8", "surrogateescape").split(TAB)
        size, width, height = map(int, words[1:4])
        check = int(words[len(COLUMNS)]) if checked else None
        return cls(size, width, height, int(words[5], 16), words[6], words[7], check)

    def line(self, name: str, label: str) -> bytes:
        """Return the row's line, in the order of COLUMNS."""
        words = [name, self.size, self.width, self.height, label, f"{self.crc:08x}", self.piece, self.offset]
        words += [] if self.check is None else [self.check]
        return (TAB.join(map(str, words)) + "\n").encode("utf-8", "surrogateescape")


def _totals(rows: list[_Row]) -> Counter[str]:
    """Counts of some rows."""
    checks = [row.check for row in rows if row.check is not None]
    bad, pillow = checks.count(0), checks.count(BY_PILLOW)
    found = {"bad": bad, "pillow": pillow, "plain": len(checks) - bad - pillow} if checks else {}
    unreadable = sum(not row.width for row in rows)
    return Counter(samples=len(rows), bytes=sum(row.size for row in rows), unreadable=unreadable, **found)


def _measure(given: tuple[Source, bool], part: _Part) -> list[tuple[_Row | None, bytes | None]]:
    """Return (row, or None where the known one is still right; stamp of its file) of each sample of a part. Several are
    read at a time if each read is a request.
    """
    images, check = given
    first = part.first
    if part.names is not None:
        images, first = FolderSource(images.storage, part.names), 0
    samples = range(first, first + len(part.known))
    pieces = part.names or [_piece(images, sample) for sample in samples]
    distinct = list(dict.fromkeys(pieces))
    stamps = dict(zip(distinct, images.storage.stamps(distinct), strict=True))
    changed = [
        sample
        for sample, piece, known in zip(samples, pieces, part.known, strict=True)
        if known is None or not known.still(stamps[piece])
    ]
    if images.storage.readers == 1:
        read = {sample: _row(images, sample, check=check) for sample in changed}
    else:
        with ThreadPoolExecutor(images.storage.readers) as pool:
            read = dict(zip(changed, pool.map(partial(_row, images, check=check), changed), strict=True))
    # what could not be read may be readable next time
    return [
        (row, None if row is not None and not row.size else stamps[piece])
        for row, piece in zip(map(read.get, samples), pieces, strict=True)
    ]


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
    """Return the file of a sample, without TFRecord's `extent`, which reads it."""
    return images.name(sample).rpartition(":")[0] if images.kind == "tfrecord" else images.extent(sample)[0]


def _place(root: str | Path, out: Path | None) -> Path:
    if out is None and is_address(str(root)):
        raise UserError(f"{root} is an object store: name a local file for the manifest with --out")
    if out is None:
        # Of one file beside it under its name: the folder's manifest is of all that is in it.
        out = Path(root) if Path(root).is_dir() else Path(root).with_name(f"{Path(root).name}.tsv")
    if out.is_dir():
        out /= MANIFEST_FILE
    if not is_manifest(out.name):
        raise UserError(f"{out}: a manifest's name ends in .tsv; name another --out")
    return out


def _present(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return folder if folder.is_dir() or folder == folder.parent else _present(folder.parent)


def _root_for(root: str, out: Path) -> str:
    """Return the manifest's field root: relative if the manifest is in the root itself, so that both can move."""
    return "." if not is_address(root) and out.absolute().parent.resolve() == Path(root).resolve() else root
