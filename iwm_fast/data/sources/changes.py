"""Changes of a folder since its manifest was written, by the times of its folders.

A folder's time changes when a name in it comes or goes. Only folders that are newer than the manifest are listed, so an
unchanged set of a million files takes one look at each of its folders. Changes inside a file show when it is read
(`manifest`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from iwm_fast.data.sources.kinds import is_image, is_records, is_shard
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.manifest import ManifestSource
from iwm_fast.data.sources.storage import LocalStorage, Storage, is_folder

__all__ = ["changes"]

ADDED = "file(s) that came after their manifest: index again"
GONE = "file(s) of the manifest that are gone: index again"
UNCOMPARED = "folder(s) that changed after their manifest was written, too large to compare with it: index again"
ALTERED = "file(s) that changed after their manifest was written: index again"

_COMPARED = 1_000_000  # names of changed folders that are read again, 3 s

_KINDS: dict[str, Callable[[str], bool]] = {"folder": is_image, "webdataset": is_shard, "tfrecord": is_records}


def changes(storage: Storage, source: ManifestSource) -> LeftOut:
    """Return what came, went or (shards) changed below the storage's root since the manifest was written.

    Of more than `LOOKED_AT` folders (or shards) so many are looked at, evenly spread; of folders that changed the first
    that hold a million images together are compared, the others only counted.
    """
    left_out = LeftOut()
    if not isinstance(storage, LocalStorage):
        return left_out
    places = source.index.places
    of_folder = source.kind == "folder"
    folders = {""}
    for name, _, _ in places:
        folder = name if of_folder else name.rpartition("/")[0]
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    times = {folder: _changed(storage, folder) for folder in folders}
    newer = {folder for folder, when in times.items() if when > source.written_ns and when != source.index.settled_ns}
    if newer:
        known, skipped = _known(source, newer) if of_folder else (_files_in(source, newer), [])
        left_out.add(UNCOMPARED, *skipped)
        beyond = folders if source.index.all_places else None
        there = {name for folder in newer for name in _listed(storage, folder, beyond, _KINDS[source.kind])}
        left_out.add(ADDED, *sorted(there - known))
        left_out.add(GONE, *sorted(name for name in known - there if not os.path.lexists(storage.shown(name))))
    if not of_folder:
        left_out.add(ALTERED, *(name for name, _, _ in places if _changed(storage, name) > source.written_ns))
    return left_out


def _known(source: ManifestSource, newer: set[str]) -> tuple[set[str], list[str]]:
    """The images directly in these folders, and those folders that are too large to compare."""
    known: set[str] = set()
    skipped, rows = [], 0
    for folder, first, last in source.index.places:
        if folder not in newer:
            continue
        rows += last + 1 - first
        if rows > _COMPARED:
            skipped.append(folder or ".")
            newer.discard(folder)
            continue
        names = (source.name(row) for row in range(first, last + 1))
        known.update(name for name in names if name.rpartition("/")[0] == folder)
    return known, skipped


def _files_in(source: ManifestSource, newer: set[str]) -> set[str]:
    return {name for name in source.index.files() if name.rpartition("/")[0] in newer}


def _changed(storage: LocalStorage, name: str) -> int:
    """Its time; 0 where that is unknown, as of a missing file (its folder changed then)."""
    try:
        return os.stat(storage.shown(name)).st_mtime_ns  # noqa: PTH116  (a thousand folders)
    except OSError:
        return 0


def _listed(storage: LocalStorage, folder: str, known: set[str] | None, wanted: Callable[[str], bool]) -> list[str]:
    """The wanted names of a folder, and of folders in it that the manifest does not have. known: all folders of the
    manifest; None where they are too many to tell which are new.
    """
    found = []
    beginning = f"{folder}/" if folder else ""
    top = os.path.realpath(storage.root)
    try:
        entries = list(os.scandir(storage.shown(folder)))
    except OSError:
        return []
    for entry in entries:
        name = beginning + entry.name
        if entry.name.startswith("."):
            continue
        if not is_folder(entry):
            found += [name] if wanted(name) else []
        elif (
            known is not None
            and name not in known
            and not (entry.is_symlink() and _inside(os.path.realpath(entry.path), top))
        ):
            found += [f"{name}/{inner}" for inner in LocalStorage(Path(entry.path)).names() if wanted(inner)]
    return found


def _inside(path: str, top: str) -> bool:
    """Whether a link leads to something that is listed anyway, or in a circle."""
    return path == top or path.startswith(f"{top}/") or top.startswith(f"{path}/")
