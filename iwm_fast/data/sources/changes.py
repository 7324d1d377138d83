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
from iwm_fast.data.sources.storage import LocalStorage, Storage

__all__ = ["changes"]

ADDED = "file(s) that came after their manifest: index again"
GONE = "file(s) of the manifest that are gone: index again"
ALTERED = "file(s) that changed after their manifest was written: index again"

_KINDS: dict[str, Callable[[str], bool]] = {"folder": is_image, "webdataset": is_shard, "tfrecord": is_records}


def changes(storage: Storage, source: ManifestSource, manifest: str) -> LeftOut:
    """Return what came, went or (shards) changed below the storage's root since the file `manifest` was written."""
    left_out = LeftOut()
    if not isinstance(storage, LocalStorage):
        return left_out
    written = os.stat(manifest).st_mtime_ns  # noqa: PTH116  (as the others here)
    files = source.pieces()
    folders = {""}
    for name in files:
        folder = name.rpartition("/")[0]
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    newer = {folder for folder in folders if _changed(storage, folder) > written}
    if newer:
        known = {name for name in files if name.rpartition("/")[0] in newer}
        there = {name for folder in newer for name in _listed(storage, folder, folders, _KINDS[source.kind])}
        left_out.add(ADDED, *sorted(there - known))
        left_out.add(GONE, *sorted(name for name in known - there if not os.path.lexists(storage.shown(name))))
    if source.kind != "folder":
        left_out.add(ALTERED, *(name for name in files if _changed(storage, name) > written))
    return left_out


def _changed(storage: LocalStorage, name: str) -> int:
    """Its time; 0 where that is unknown, as of a missing file (its folder changed then)."""
    try:
        return os.stat(storage.shown(name)).st_mtime_ns  # noqa: PTH116  (a thousand folders)
    except OSError:
        return 0


def _listed(storage: LocalStorage, folder: str, known: set[str], wanted: Callable[[str], bool]) -> list[str]:
    """The wanted names of a folder, and of folders in it that the manifest does not have."""
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
        if not entry.is_dir():
            found += [name] if wanted(name) else []
        elif name not in known and not (entry.is_symlink() and _inside(os.path.realpath(entry.path), top)):
            found += [f"{name}/{inner}" for inner in LocalStorage(Path(entry.path)).names() if wanted(inner)]
    return found


def _inside(path: str, top: str) -> bool:
    """Whether a link leads to something that is listed anyway, or in a circle."""
    return path == top or path.startswith(f"{top}/") or top.startswith(f"{path}/")
