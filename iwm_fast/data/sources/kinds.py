"""Recognise files by name."""

from __future__ import annotations

import re

__all__ = [
    "EXTENSIONS",
    "MANIFEST_FILE",
    "NAMELESS",
    "SHARDS_FILE",
    "is_image",
    "is_manifest",
    "is_member_image",
    "is_packed",
    "is_records",
    "is_shard",
    "is_system",
    "record_index_names",
    "type_of",
]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
MANIFEST_FILE = "iwm-fast-manifest.tsv"
SHARDS_FILE = "shards.json"  # beside shards: what is in them
NAMELESS = "image"  # a shard's extension of an image that had no name before, a TFRecord's

# TensorFlow's own scripts name files train-00000-of-01024, or x.tfrecord-00000-of-00010
_RECORDS = re.compile(r"\.tfrecords?$|-\d{5}-of-\d{5}$", re.IGNORECASE)
# Files that systems and editors write beside people's; hidden files are not listed at all.
_SYSTEM = re.compile(r"(^|/)(thumbs\.db|ehthumbs(_vista)?\.db|desktop\.ini|icon\r|[^/]*~)$", re.IGNORECASE)
_ENDING = re.compile(r"\.[A-Za-z0-9_]{1,12}$")
_PACKED = re.compile(
    r"\.(tgz|txz|tbz2?|tzst|zip|7z|rar)$|(\.tar|\.tfrecords?|-of-\d{5})\.(gz|bz2|xz|zstd?|lz4|br)$", re.IGNORECASE
)


def is_image(name: str) -> bool:
    """Return whether it has an image's extension, in any case."""
    dot = name.rfind(".")
    return dot > 0 and name[dot:].lower() in EXTENSIONS


def is_member_image(name: str) -> bool:
    """Return whether a member of a shard is an image: by its extension, or packed from where images have no names."""
    return is_image(name) or name.endswith(f".{NAMELESS}")


def is_shard(name: str) -> bool:
    """Return whether it is a tar shard's name."""
    return name.lower().endswith(".tar")


def is_records(name: str) -> bool:
    """Return whether it is a TFRecord file's name."""
    return _RECORDS.search(name) is not None


def is_system(name: str) -> bool:
    """Return whether a system or an editor wrote it: thumbnails, a folder's settings, a backup."""
    return _SYSTEM.search(name) is not None


def type_of(name: str) -> str:
    """Return the ending in lower case (.heic, .tar.gz), or "without extension"."""
    last = name.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    packed = _PACKED.search(last)
    found = packed or _ENDING.search(last[1:])
    return found[0].lower() if found else "without extension"


def is_packed(name: str) -> bool:
    """Return whether it is a compressed archive's name, which allows no random access."""
    return _PACKED.search(name) is not None


def is_manifest(name: str) -> bool:
    """Return whether it is a manifest's name; its first line decides."""
    return name.endswith(".tsv")


def record_index_names(file: str) -> tuple[str, ...]:
    """Return names of a TFRecord file's index: with .idx added, or with .idx for the extension."""
    stem = file.rsplit(".", 1)[0] if file.lower().endswith((".tfrecord", ".tfrecords")) else file
    return tuple(dict.fromkeys((f"{file}.idx", f"{stem}.idx")))
