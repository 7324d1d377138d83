"""The index beside a tar shard (`wds2idx`'s NAME.idx), used only if it matches its shard.

An index may belong to another shard (`wds2idx` writes one train.idx for train.0000.tar, train.0001.tar, …), to an older
one of the same name, or be truncated. It matches if its members are contiguous except for gaps that the shard's own
headers explain, its last member is the shard's last, and the headers at a few members (at all, if the index is older
than its shard) agree with it. Each later read compares the header before the bytes (`webdataset`). So checking an index
takes a few reads per shard, not one per member.
"""

from __future__ import annotations

import os
import tarfile

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.storage import Storage
from iwm_fast.data.sources.tar import BLOCK, ENCODING, Member, TornTar, agrees, entries, is_hidden, name_of, padded

__all__ = ["INDEX_VERSION", "Misfit", "index_names", "indexed_members", "is_older"]

INDEX_VERSION = "v1.2"
_NAMELESS = frozenset({"v1.0", "v1.1"})  # (extension, offset, size) per member: the names are in the shard only
# With more gaps than this, a walk over all headers is as fast.
_GAPS = 64


class Misfit(Exception):  # noqa: N818  (a verdict on a file)
    """The index does not match the shard."""


def index_names(shard: str) -> tuple[str, ...]:
    """Return the possible names of a shard's index: its own, and `wds2idx`'s, which cuts the name at its first dot."""
    own = shard.rsplit(".", 1)[0]
    return tuple(dict.fromkeys((f"{own}.idx", f"{shard[: shard.index('.', shard.rfind('/') + 2)]}.idx")))


def is_older(storage: Storage, index: str, piece: str) -> bool:
    """Return whether an index is older than its file; False for an object store, where times are unknown."""
    try:
        written = [os.stat(storage.shown(name)).st_mtime_ns for name in (index, piece)]  # noqa: PTH116
    except OSError:
        return False
    return written[0] < written[1]


def indexed_members(storage: Storage, shard: str, index: str, left_out: LeftOut) -> list[Member] | None:
    """Return the members that the index lists, or None if only a walk over the headers can tell. Raise Misfit if the
    index does not match.
    """
    try:
        found = _parse(storage.read(index).decode("utf-8", "surrogateescape").split("\n"))
    except (BadSample, ValueError, IndexError) as error:
        raise Misfit(str(error)) from error
    if not found:
        return None
    size = storage.size(shard)
    ends = [0, *(member.offset + padded(member.size) for member in found)]
    gaps = [number for number, member in enumerate(found) if member.offset - BLOCK != ends[number]]
    if any(found[number].offset - BLOCK < ends[number] for number in gaps):
        raise Misfit("its members overlap")
    if found[-1].offset + found[-1].size > size:
        raise Misfit(f"its last member ends after byte {size}, the end of the shard")
    if len(gaps) > max(_GAPS, len(found) // 8):
        return None
    spots = sorted({0, len(found) // 2, len(found) - 1, *gaps})
    if is_older(storage, index, shard):
        spots = list(range(len(found)))
    aside, torn, explained = LeftOut(), 0, set(gaps)
    for number in spots:
        last = number == len(found) - 1
        block = storage.read(shard, found[number].offset - BLOCK, BLOCK)
        if number not in explained and not last and agrees(block, found[number].name, found[number].size, whole=True):
            continue
        try:
            between = list(entries(storage, shard, aside, ends[number], None if last else ends[number + 1], size))
        except (TornTar, tarfile.TarError, BadSample, EOFError) as error:
            if block[257:262] != b"ustar" and not block.startswith(found[number].name.encode(*ENCODING)):
                raise Misfit(f"there is no header where it has {found[number].name}") from error
            torn += 1  # one damaged header is the shard's fault, many are the index's
            continue
        if not _are(between, found[number]):
            return None
    if 2 * torn > len(spots):
        raise Misfit("there are no headers where its members are")
    left_out.merge(aside)
    return [member for member in found if member.name and not is_hidden(member.name)]


def _are(between: list[tarfile.TarInfo], member: Member) -> bool:
    """Return whether these headers belong to this one member; False if there are links among them.

    Raise Misfit if they belong to other members.
    """
    seen = [entry for entry in between if entry.isreg() and not entry.issparse()]
    visible = [entry for entry in seen if not is_hidden(name_of(entry.name)) or name_of(entry.name) == member.name]
    if [(name_of(entry.name), entry.offset_data, entry.size) for entry in visible] != [
        (member.name, member.offset, member.size)
    ]:
        raise Misfit(f"{visible[0].name if visible else 'nothing'} lies where it has {member.name}")
    return not any(entry.islnk() or entry.issym() or entry.issparse() for entry in between)


def _parse(lines: list[str]) -> list[Member]:
    """Return the members of an index of version 1.2; none if it has no names, or names that it cannot represent."""
    version, count = lines[0].split()
    if version in _NAMELESS:
        return []
    if version != INDEX_VERSION:
        raise ValueError(f"it is an index of version {version}")
    rows = [line for line in lines[1:] if line]
    if len(rows) != int(count):
        raise ValueError(f"it has {len(rows)} samples, and its first line says {count}")
    found = []
    for number, row in enumerate(rows):
        words = row.split()
        if len(words) % 4:
            # a space in a name, which an index cannot represent, or a truncated line
            raise ValueError(f"line {number + 2} has {len(words)} words, not a multiple of 4")
        if "\\" in row:
            return []  # tar escapes non-ASCII letters and line breaks
        found += [
            Member(name_of(words[at + 3]), int(words[at + 1]), int(words[at + 2])) for at in range(0, len(words), 4)
        ]
    return found
