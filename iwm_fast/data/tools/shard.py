"""Pack images into WebDataset tar shards, with indexes for DALI's reader.

The same images give the same bytes: samples are in the source's order, headers have no times or owners. Samples are
assigned to shards by their lengths before anything is written. So a run resumes a killed one at its first missing
shard; with other images it is refused.

A sample is KEY.EXTENSION and, if there are classes, KEY.cls with the class's number; `classes.txt` has the class names.
KEY is the image's path without its extension; characters that a key cannot have (dots, spaces) are %XX.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from iwm_fast.atomic_files import write_whole, write_whole_text
from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources import Source, open_source
from iwm_fast.data.sources.base import UNLABELLED
from iwm_fast.data.sources.kinds import NAMELESS, SHARDS_FILE, is_member_image
from iwm_fast.data.sources.names import escape
from iwm_fast.data.sources.shard_index import INDEX_VERSION
from iwm_fast.data.sources.webdataset import CLASSES_FILE
from iwm_fast.data.split_layout import tell_of_splits
from iwm_fast.errors import UserError, because
from iwm_fast.file_locks import hold
from iwm_fast.outputs import require_folder

__all__ = ["SHARD_BYTES", "write_shards"]

SHARD_BYTES = 256 * 2**20
_PLAN_FILE = ".plan"
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 100  # fits the tar header's own field; longer names need extended headers, which wds2idx miscounts

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class _Sample:
    number: int
    key: str
    extension: str
    size: int
    label: int | None

    @property
    def tar_bytes(self) -> int:
        """Bytes in a shard: a header and whole blocks for each member."""
        members = [self.size] + ([] if self.label is None else [len(str(self.label))])
        return sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in members)


def write_shards(
    root: str | Path,
    out: Path,
    *,
    source: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack every image below `root` into out/shard-NNNNNN.tar of about `shard_bytes`, each with its shard-NNNNNN.idx.

    Files are packed unchanged, whether they decode or not. Each shard is renamed into place when complete, then its
    index, and last `shards.json`, which lists them. Returns {out, shards, samples, bytes, classes, resumed, left_out};
    resumed: shards kept from an earlier run. Raises UserError as `list_images`; if `out` lies in `root`, has
    other files or another process writes it; and for a file that cannot be read or changes its length meanwhile.
    """
    require_folder(out, read=root)
    images = open_source(root, source)
    tell_of_splits(root, "they are packed as classes, which no evaluation accepts")
    labels, classes = images.labels
    samples = list(_samples(images, None if labels is None else labels.tolist(), progress))
    shards = list(_divide(samples, shard_bytes))
    plan = _plan(samples, shard_bytes, classes)
    kept, done = 0, 0
    try:
        with _held(out, plan):
            if classes:
                names = "".join(f"{escape(name)}\n" for name in classes).encode("utf-8", "surrogateescape")
                write_whole(out / CLASSES_FILE, lambda file: file.write(names))
            for number, shard in enumerate(shards):
                path = out / f"shard-{number:06d}.tar"
                if _is_whole(path, shard):
                    kept += 1
                else:
                    _write_shard(images, shard, path)
                done += len(shard)
                if progress is not None:
                    progress("pack", done, len(samples))
            total = sum(sample.size for sample in samples)
            answer = {"shards": len(shards), "samples": len(samples), "bytes": total, "classes": len(classes)}
            text = json.dumps({"schema": "iwm-fast-shards/1", **answer, "plan": plan}, indent=1) + "\n"
            write_whole_text(out / SHARDS_FILE, text)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {because(error, 'choose another --out')}") from error
    return {"out": str(out.absolute()), **answer, "resumed": kept, "left_out": images.left_out.rows()}


def _samples(images: Source, labels: list[int] | None, progress: Progress | None) -> Iterator[_Sample]:
    """Yield the samples to pack, without bytes. In an object store each length is a request, so several run at once."""
    taken: set[str] = set()
    with ThreadPoolExecutor(images.storage.readers) as pool:
        for number, size in enumerate(pool.map(partial(_size, images), range(len(images)))):
            key, extension = _key(images, number, taken, classes=labels is not None)
            label = None if labels is None or labels[number] == UNLABELLED else labels[number]
            yield _Sample(number, key, extension, size, label)
            if progress is not None and (number % 1000 == 999 or number + 1 == len(images)):
                progress("plan", number + 1, len(images))


def _key(images: Source, number: int, taken: set[str], *, classes: bool) -> tuple[str, str]:
    """Return key and extension of a sample; keys are unique. Without ``classes`` they have no folders, which would be
    read as classes.
    """
    name = images.name(number)
    stem, extension = name.rsplit(".", 1) if is_member_image(name) else (name, NAMELESS)
    key = quote(stem, safe="/" if classes else "", errors="surrogateescape").replace(".", "%2E")
    if key in taken:  # a.jpg beside a.png would be one sample
        key = f"{key}%2E{extension}"
    if key in taken or len(f"{key}.{extension}") > _LONGEST_NAME:
        key = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    taken.add(key)
    return key, extension.lower()


def _size(images: Source, number: int) -> int:
    try:
        return images.size(number)
    except BadSample as bad:
        raise _unreadable(images, number, bad.reason) from bad


def _unreadable(images: Source, number: int, reason: str) -> UserError:
    name = images.storage.shown(images.name(number))
    return UserError(f"{name}: {reason}; fix or remove it and run this again (it keeps what is packed)")


def _divide(samples: list[_Sample], shard_bytes: int) -> Iterator[list[_Sample]]:
    """Yield the samples of each shard, at least one."""
    shard: list[_Sample] = []
    filled = 0
    for sample in samples:
        if shard and filled + sample.tar_bytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(sample)
        filled += sample.tar_bytes
    if shard:
        yield shard


def _plan(samples: list[_Sample], shard_bytes: int, classes: tuple[str, ...]) -> str:
    """Return a digest of everything that determines the shards' names, order and lengths."""
    digest = hashlib.sha256(json.dumps([shard_bytes, classes]).encode())
    for sample in samples:
        digest.update(f"{sample.key}.{sample.extension} {sample.size} {sample.label}\n".encode())
    return digest.hexdigest()


@contextmanager
def _held(out: Path, plan: str) -> Iterator[None]:
    """Lock `out`. Raise UserError if it has files of another plan."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / _PLAN_FILE).open("a+") as file:
        try:
            hold(file, str(out))
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is packing into it; wait for it") from error
        file.seek(0)
        before = file.read().strip()
        others = any(path.name != _PLAN_FILE for path in out.iterdir())
        if before != plan and others:
            raise UserError(
                f"{out} has {'shards of other images or another size' if before else 'other files'}; "
                "choose another --out, or remove it"
            )
        file.truncate(0)
        file.write(plan + "\n")
        file.flush()
        yield


def _is_whole(path: Path, shard: list[_Sample]) -> bool:
    """Return whether a shard is complete: its index is written after it."""
    if not path.exists() or not path.with_suffix(".idx").exists():
        return False
    filled = sum(sample.tar_bytes for sample in shard) + 2 * _BLOCK
    return path.stat().st_size == -(-filled // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _write_shard(images: Source, shard: list[_Sample], path: Path) -> None:
    lines: list[str] = []

    def write(file: BinaryIO) -> None:
        for sample, raw in _ahead(images, shard):
            if len(raw) != sample.size:
                reason = f"it changed from {sample.size} to {len(raw)} bytes while packing"
                raise _unreadable(images, sample.number, reason)
            words = [f"{sample.extension} {_add(file, f'{sample.key}.{sample.extension}', raw)}"]
            if sample.label is not None:
                words.append(f"cls {_add(file, f'{sample.key}.cls', str(sample.label).encode())}")
            lines.append(" ".join(words))
        file.write(bytes(2 * _BLOCK))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))

    write_whole(path, write)
    text = f"{INDEX_VERSION} {len(lines)}\n" + "".join(f"{line}\n" for line in lines)
    write_whole_text(path.with_suffix(".idx"), text)


def _ahead(images: Source, shard: list[_Sample]) -> Iterator[tuple[_Sample, bytes]]:
    """Yield the samples' bytes, with a few reads in flight."""
    readers = images.storage.readers
    coming: deque[tuple[_Sample, Future[bytes]]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        for sample in shard:
            coming.append((sample, pool.submit(_bytes, images, sample)))
            if len(coming) > readers:
                yield _arrived(images, *coming.popleft())
        while coming:
            yield _arrived(images, *coming.popleft())


def _bytes(images: Source, sample: _Sample) -> bytes:
    return images.read(sample.number) if sample.size else b""  # an empty file is a bad sample


def _arrived(images: Source, sample: _Sample, coming: Future[bytes]) -> tuple[_Sample, bytes]:
    try:
        return sample, coming.result()
    except BadSample as bad:
        raise _unreadable(images, sample.number, bad.reason) from bad


def _add(file: BinaryIO, name: str, data: bytes) -> str:
    """Append a member; return "offset size name" for the index."""
    entry = tarfile.TarInfo(name)  # mode 644, no time, no owner
    entry.size = len(data)
    file.write(entry.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % _BLOCK))
    return f"{offset} {len(data)} {name}"
