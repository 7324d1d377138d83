"""The index beside a tar shard (`wds2idx`'s NAME.idx), believed only where it fits the shard that it lies beside.

An index may belong to another shard (`wds2idx` writes one train.idx for train.0000.tar, train.0001.tar, …), to an older
one of the same name, or be torn. Its members have to follow one another without a gap that is not explained by the
shard's own headers, its last one has to be the shard's last, and the headers in a few places (in all, where the index
is older than its shard) have to say what it says. Each later read compares the header before the bytes (`webdataset`).
So it costs a few reads per shard, not one per member.
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
_NAMELESS = frozenset({"v1.0", "v1.1"})  # (extension, offset, size) a member: the names are in the shard only
# Where there are more gaps than this to be looked at, a walk over all headers takes no longer.
_GAPS = 64


class Misfit(Exception):  # noqa: N818  (a verdict on a file)
    """The index does not belong to the shard as it is."""


def index_names(shard: str) -> tuple[str, ...]:
    """Names of a shard's index: its own, and `wds2idx`'s, which replaces all from the first dot of the file's name."""
    own = shard.rsplit(".", 1)[0]
    return tuple(dict.fromkeys((f"{own}.idx", f"{shard[: shard.index('.', shard.rfind('/') + 2)]}.idx")))


def is_older(storage: Storage, index: str, piece: str) -> bool:
    """Whether an index was written before the file that it is of; a store does not tell."""
    try:
        written = [os.stat(storage.shown(name)).st_mtime_ns for name in (index, piece)]  # noqa: PTH116
    except OSError:
        return False
    return written[0] < written[1]


def indexed_members(storage: Storage, shard: str, index: str, left_out: LeftOut) -> list[Member] | None:
    """The members that the index lists, None where only a walk tells (nothing is wrong with it); Misfit else."""
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
        raise Misfit(f"its last member ends behind byte {size}, the shard's end")
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
            torn += 1  # a damaged header of a shard is no reason to doubt its index; many of them are
            continue
        if not _are(between, found[number]):
            return None
    if 2 * torn > len(spots):
        raise Misfit("there are no headers where its members are")
    left_out.merge(aside)
    return [member for member in found if member.name and not is_hidden(member.name)]


def _are(between: list[tarfile.TarInfo], member: Member) -> bool:
    """Whether the headers of a stretch are those of this one member; False where links are among them.

    Misfit where they are of other members.
    """
    seen = [entry for entry in between if entry.isreg() and not entry.issparse()]
    visible = [entry for entry in seen if not is_hidden(name_of(entry.name)) or name_of(entry.name) == member.name]
    if [(name_of(entry.name), entry.offset_data, entry.size) for entry in visible] != [
        (member.name, member.offset, member.size)
    ]:
        raise Misfit(f"{visible[0].name if visible else 'nothing'} lies where it has {member.name}")
    return not any(entry.islnk() or entry.issym() or entry.issparse() for entry in between)


def _parse(lines: list[str]) -> list[Member]:
    """Members of an index of version 1.2; of one without names, or with names that it cannot hold, none."""
    version, count = lines[0].split()
    if version in _NAMELESS:
        return []
    if version != INDEX_VERSION:
        raise ValueError(f"an index of version {version}")
    rows = [line for line in lines[1:] if line]
    if len(rows) != int(count):
        raise ValueError(f"{len(rows)} samples where its first line says {count}")
    found = []
    for number, row in enumerate(rows):
        words = row.split()
        if len(words) % 4:
            # a space within a name, which no index can hold; or a line that was cut off
            raise ValueError(f"line {number + 2} has {len(words)} words, which is no multiple of 4")
        if "\\" in row:
            return []  # tar lists letters beyond ASCII, and ends of line, as escapes
        found += [
            Member(name_of(words[at + 3]), int(words[at + 1]), int(words[at + 2])) for at in range(0, len(words), 4)
        ]
    return found
