"""Identify a list of samples by names below the root, in order, and sizes; not by where the root is.

Labels do not count, because pretraining does not read them. For triplets the manifest's rows count too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.left_out import some
from iwm_fast.data.sources.list_digest import ListDigest
from iwm_fast.data.triplets import Triplets

__all__ = ["Identity", "difference", "identity_of", "names_digest", "read_identity"]

_SCHEMA = 1
_SHARDS = 2000  # recorded, 100 KB of names; more are not


@dataclass(frozen=True)
class Identity:
    """A list of samples in a few kilobytes.

    samples: their number. bytes: their total size. digest: SHA-256 of names, sizes and, for triplets, rows. names and
    sizes: checksums of the list's parts, of ``part`` samples each. shards: samples of each shard or TFRecord file; None
    of more than 2,000.
    """

    samples: int
    bytes: int
    digest: str
    part: int
    names: tuple[str, ...]
    sizes: tuple[str, ...]
    shards: dict[str, int] | None = None

    def document(self) -> dict[str, Any]:
        """For a checkpoint's index."""
        return {"schema": _SCHEMA, **asdict(self)}


def identity_of(files: ImageSet | Triplets) -> Identity:
    """Return the list's identity. Sizes come from the list, else from the file system or the object store; no image is
    read. A manifest's was computed when it was indexed. Raises UserError where the place is gone.
    """
    images = files.frames if isinstance(files, Triplets) else files
    found = images.sums if isinstance(files, ImageSet) else None
    if found is None:
        digest = ListDigest(len(images))
        digest.add([name.encode("utf-8", "surrogateescape") for name in _names(images)], _sizes(images))
        if isinstance(files, Triplets):
            for column in (files.source, files.target, files.values, files.episode, files.step):
                digest.update(b"-" if column is None else column.tobytes())
        found = digest.sums()
    shards = images.source.shards() if images.rows is None else None
    if shards is not None and len(shards) > _SHARDS:
        shards = None
    return Identity(len(files), found.bytes, found.digest, found.part, found.names, found.sizes, shards)


def names_digest(files: ImageSet | Triplets) -> tuple[int, str]:
    """Return (number of samples, SHA-256 of their names below the root), for ranks to compare, without sizes."""
    known = files.sums if isinstance(files, ImageSet) else None
    if known is not None:
        return len(files), known.names_digest
    digest = hashlib.sha256()
    for name in _names(files.frames if isinstance(files, Triplets) else files):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return len(files), digest.hexdigest()


def read_identity(document: object) -> Identity | None:
    """Read what `Identity.document` returned; None for anything else, as in older checkpoints."""
    if not isinstance(document, Mapping) or document.get("schema") != _SCHEMA:
        return None
    try:
        return Identity(
            int(document["samples"]), int(document["bytes"]), str(document["digest"]), int(document["part"]),
            tuple(map(str, document["names"])), tuple(map(str, document["sizes"])),
            {str(name): int(count) for name, count in shards.items()} if (shards := document.get("shards")) else None,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def difference(before: Identity, now: Identity, files: ImageSet | Triplets) -> str | None:
    """Return how the list ``files``, of identity ``now``, differs from an earlier one, in words; None where it
    does not.
    """
    if before.digest == now.digest:
        return None
    shards = _shard_changes(before.shards, now.shards)
    if before.samples != now.samples:
        return f"{now.samples} samples, {before.samples} before{f': {shards}' if shards else ''}"
    if shards:
        return shards
    images = files.frames if isinstance(files, Triplets) else files
    for word in ("names", "sizes"):
        pairs = zip(getattr(before, word), getattr(now, word), strict=False)
        place = next((at for at, (old, new) in enumerate(pairs) if old != new), None)
        if place is not None:
            return f"other {word}, first {_shown(images, place * now.part, now.part)}"
    return "other pictures or actions in the manifest's rows" if isinstance(files, Triplets) else "another list"


def _shard_changes(before: dict[str, int] | None, now: dict[str, int] | None) -> str:
    """What became of the shards, in words; "" where they are the same, or unknown."""
    if not before or not now:
        return ""
    found = {
        "gone": [name for name in before if name not in now],
        "new": [name for name in now if name not in before],
        "with another number of samples": [name for name in now if before.get(name, now[name]) != now[name]],
    }
    return "; ".join(
        f"{len(names)} shard{'s' if len(names) > 1 else ''} {what} ({some(names, len(names))})"
        for what, names in found.items()
        if names
    )


def _shown(images: ImageSet, first: int, part: int) -> str:
    last = min(first + part, len(images)) - 1
    if first > last:
        return "at the end of the list"
    start, end = (images.source_name(place) for place in (first, last))
    return f"at {start}" if first == last else f"from {start} to {end}"


def _names(images: ImageSet) -> Iterable[str]:
    return (images.source_name(sample) for sample in range(len(images)))


def _sizes(images: ImageSet) -> list[int]:
    """Bytes of each sample; -1 where it is gone. 0 for TFRecord, whose names have the offset and whose sizes would have
    to be read.
    """
    source = images.source
    if source.kind == "tfrecord":
        return [0] * len(images)
    if isinstance(source, FolderSource):
        return source.storage.sizes(list(_names(images)))
    return [_size(images, sample) for sample in range(len(images))]


def _size(images: ImageSet, sample: int) -> int:
    try:
        return images.source.size(images.row(sample))
    except BadSample:
        return -1
