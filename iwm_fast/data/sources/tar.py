"""List a tar file's members from its headers alone, read from a storage by offset.

Nothing is unpacked or written, so absolute names and `..` are harmless. Names are normalised (no `./`, no leading `/`,
no `..`), so a shard of a folder has the folder's names.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.kinds import is_member_image
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.storage import SYSTEM_FOLDERS, Storage
from iwm_fast.errors import UserError

__all__ = [
    "BLOCK",
    "ENCODING",
    "Member",
    "TornTar",
    "entries",
    "header_of",
    "is_hidden",
    "members",
    "name_of",
    "padded",
]

BLOCK = tarfile.BLOCKSIZE
CUT_OFF = "truncated shard(s), without an end mark"
BEHIND = "shard(s) with bytes after their end that are not tar members"
_SPARSE = "sparse member(s), whose bytes are not contiguous"
_REPLACED = "member(s) that a later one of the same name replaces"
_LINKS = "link(s) to files outside their shard"
_FOLDER_LINKS = "link(s) to a folder, which are not followed"

# Bytes read at once when walking the headers of a shard without an index, if every read is a request.
_WALK_BUFFER = 1 << 18
_LONGEST_NAME = 99  # bytes of a name that fit the header's own field, whatever program wrote it
ENCODING = ("utf-8", "surrogateescape")
# Their name, size or place is in additional blocks, which tarfile reads.
_EXTENDED = frozenset(
    {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE}
    | {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of a shard. offset: of its bytes. size: their number."""

    name: str
    offset: int
    size: int


class TornTar(Exception):  # noqa: N818  (a verdict on a file)
    """A header is missing; the message says where and why."""


def padded(size: int) -> int:
    """Return the bytes of a member's data, rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def name_of(name: str) -> str:
    """Return a member's name normalised; "" for the root."""
    parts = posixpath.normpath(name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def is_hidden(name: str) -> bool:
    """Return whether a part of a name begins with a dot or is a system folder; folders skip such files as well."""
    return name.startswith(".") or "/." in name or not SYSTEM_FOLDERS.isdisjoint(name.split("/")[:-1])


def header_of(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in these 512 bytes, or None."""
    try:
        entry = tarfile.TarInfo.frombuf(block, *ENCODING)
    except tarfile.HeaderError:
        return None
    return entry if entry.size >= 0 else None


def key_of(name: str) -> str:
    """Return a name up to the first dot of its last part."""
    dot = name.find(".", name.rfind("/") + 1)
    return name if dot < 0 else name[:dot]


def agrees(block: bytes, name: str, size: int, *, whole: bool) -> bool:
    """Return whether a header belongs to a member of this size and this name, or (not `whole`) with this key."""
    if block.startswith(name.encode(*ENCODING) + (b"\0" if whole else b".")) and (
        block[124:136].rstrip(b" \0") == b"%011o" % size
    ):
        return True  # nearly always; the rest takes 20 µs
    header = header_of(block)
    if header is None or header.size != size:
        return False
    if not name.isascii() or len(name) > _LONGEST_NAME:
        return True  # its header has a shortened name; the whole one is before it
    return (name_of(header.name) if whole else key_of(name_of(header.name))) == name


def members(storage: Storage, shard: str, left_out: LeftOut) -> list[Member]:
    """Return the visible regular files of a shard, in order, and the links that lead to one of them.

    Of several with the same name the last counts, as in tar. Raise UserError if the file is not a tar file or damaged.
    """
    found: dict[str, Member] = {}
    links: dict[str, tuple[str, bool]] = {}
    try:
        for entry in entries(storage, shard, left_out):
            name = name_of(entry.name)
            if not name or is_hidden(name):
                continue
            if entry.issparse():
                left_out.add(_SPARSE, f"{shard}:{name}")
            elif entry.isreg():
                if found.pop(name, None) is not None:
                    left_out.add(_REPLACED, f"{shard}:{name}")
                found[name] = Member(name, entry.offset_data, entry.size)
            elif entry.islnk() or entry.issym():
                found.pop(name, None)
                links[name] = (entry.linkname, entry.issym())
    except (TornTar, tarfile.TarError, BadSample, EOFError) as error:
        raise UserError(f"{storage.shown(shard)}: not a whole tar file ({error}); fix or remove it") from error
    _follow(found, links, shard, left_out)
    return list(found.values())


def entries(
    storage: Storage, shard: str, left_out: LeftOut, begin: int = 0, end: int | None = None, size: int | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield all headers from byte `begin` to `end` (default: the end of the shard), of every type.

    size: of the shard, if known. Concatenated archives and blocks of zeros between members are read through. Raise
    TornTar if a header is missing, BadSample if the shard cannot be read.
    """
    piece = _Piece(storage, shard, storage.size(shard) if size is None else size)
    file = io.BufferedReader(piece, _WALK_BUFFER if storage.readers > 1 and end is None else 4096)
    at, ended = begin, False
    while at < (piece.size if end is None else end):
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            at, ended = _skip_zeros(file, at), True
            continue
        entry = header_of(block)
        if entry is None and ended:
            left_out.add(BEHIND, shard)
            return
        if entry is None and at > 0 and len(block) < BLOCK:
            break
        if entry is None:
            raise TornTar(_why_not(block, at))
        if entry.type in _EXTENDED:
            entry, at = _extended(file, at)
        else:
            entry.offset_data = at + BLOCK
            at = entry.offset_data + (padded(entry.size) if entry.isreg() else 0)
        ended = False
        yield entry
    if end is None and not ended:
        if not piece.size:
            raise TornTar("it is empty")
        left_out.add(CUT_OFF, shard)


def _follow(found: dict[str, Member], links: dict[str, tuple[str, bool]], shard: str, left_out: LeftOut) -> None:
    """Give each link to a member that member's bytes; count the other links whose names are images."""
    folders = {name[:at] for name in found for at, letter in enumerate(name) if letter == "/"} if links else set()
    for name in links:
        target, hops = name, 0
        while target in links and target not in found and hops < len(links) + 1:
            text, symbolic = links[target]
            # a symbolic link is relative to its own folder, a hard link to the archive's root
            beside = symbolic and not text.startswith("/")
            target = name_of(posixpath.join(posixpath.dirname(target), text) if beside else text)
            hops += 1
        if target in found:
            found[name] = Member(name, found[target].offset, found[target].size)
        elif target in folders:
            left_out.add(_FOLDER_LINKS, f"{shard}:{name}")
        elif is_member_image(name):
            left_out.add(_LINKS, f"{shard}:{name}")


def _extended(file: io.BufferedReader[_Piece], at: int) -> tuple[tarfile.TarInfo, int]:
    """Return the member of the extended header at `at`, and the offset of the next header."""
    file.seek(at)
    try:
        archive = tarfile.open(fileobj=file, mode="r:", encoding=ENCODING[0], errors=ENCODING[1])  # noqa: SIM115
        entry = archive.next()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise TornTar(f"the extended header at byte {at} is damaged: {error}") from error
    if entry is None or entry.size < 0 or archive.offset <= at:
        raise TornTar(f"the extended header at byte {at} is damaged")
    return entry, archive.offset


def _skip_zeros(file: io.BufferedReader[_Piece], at: int) -> int:
    """Return the offset of the next block with a nonzero byte, or the end of the file."""
    file.seek(at)
    while piece := file.read(64 * BLOCK):
        rest = piece.lstrip(b"\0")
        if rest:
            return at + (len(piece) - len(rest)) // BLOCK * BLOCK
        at += len(piece)
    return at


def _why_not(block: bytes, at: int) -> str:
    if at == 0:
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic):
                return f"it looks {name}-compressed, which allows no random access: decompress it"
    return f"no header at byte {at}"


class _Piece(io.RawIOBase):
    """A file of a storage as a seekable Python file."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._at, self.size = storage, name, 0, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self.size - self._at)
        data = self._storage.read(self._name, self._at, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
