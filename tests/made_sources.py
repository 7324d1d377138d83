"""Images as a folder of classes, and as TFRecord files written byte by byte."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import google_crc32c
from made_images import encode, picture

from iwm_fast.data.tools.shard import write_shards


def pack(images: Path, out: Path, kind):
    """Return a root with these images as a source of this kind; `out` is made where it is packed."""
    if kind == "folder":
        return images
    if kind == "webdataset":
        write_shards(images, out, shard_bytes=20_000)
        return out
    out.mkdir()
    files = sorted(images.rglob("*.jpg"))
    for number in range(3):
        write_records(out / f"{number}.tfrecord", [example(file.read_bytes(), 1) for file in files[number::3]])
    return out


def write_classes(root: Path, count=12, classes=("cat", "dog"), *, first=0):
    """Write `count` JPEGs of slightly different sizes, one folder per class; return their bytes by relative path."""
    made = {}
    for number in range(first, first + count):
        name = f"{classes[number % len(classes)]}/{number:03d}.jpg"
        made[name] = encode(picture(40 + number % 7, 30 + number % 5, number))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(made[name])
    return dict(sorted(made.items()))


def _varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number, data):
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def example(image, label=None):
    """Return a serialized tf.train.Example, byte by byte from the wire format."""
    features = {"image/encoded": _field(1, _field(1, image)), "image/format": _field(1, _field(1, b"JPEG"))}
    if label is not None:
        features["image/class/label"] = _field(3, _field(1, _varint(label)))
    entries = b"".join(_field(1, _field(1, name.encode()) + _field(2, value)) for name, value in features.items())
    return _field(1, entries)


def _masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(path: Path, payloads, *, index=False):
    """Write a TFRecord file of the payloads; index: also DALI's tfrecord2idx file. Return the offsets."""
    offsets, lines = [], []
    with path.open("wb") as file:
        for payload in payloads:
            offsets.append(file.tell())
            length = struct.pack("<Q", len(payload))
            file.write(length + _masked(length) + payload + _masked(payload))
            lines.append(f"{offsets[-1]} {file.tell() - offsets[-1]}\n")
    if index:
        Path(f"{path}.idx").write_text("".join(lines))
    return offsets


def write_tar(path: Path, members, **options):
    """Write a tar file of (name, bytes) or of (tarfile.TarInfo, bytes), as tarfile writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def entry(name, kind, link=""):
    """Return a tar member that is not a regular file: a link, a folder, a device."""
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made, b""
