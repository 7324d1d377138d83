"""Choose the source by what lies at its root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from iwm_fast.config.registry import SOURCES
from iwm_fast.data.sources.base import Source
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.kinds import (
    EXTENSIONS,
    MANIFEST_FILE,
    SHARDS_FILE,
    is_image,
    is_manifest,
    is_packed,
    is_records,
    is_shard,
    is_system,
    record_index_names,
)
from iwm_fast.data.sources.left_out import SKIPPED, LeftOut
from iwm_fast.data.sources.own import OwnSource
from iwm_fast.data.sources.s3 import PATIENCE, Patience, S3Storage, is_address
from iwm_fast.data.sources.shard_index import index_names
from iwm_fast.data.sources.sorted_names import SortedNames
from iwm_fast.data.sources.storage import LocalStorage, Storage, is_folder
from iwm_fast.data.sources.webdataset import CLASSES_FILE, WebDatasetSource
from iwm_fast.errors import UserError
from iwm_fast.notices import tell_once

__all__ = ["open_source", "top_level"]

SYSTEM = "folder(s) of the system"
REPEATED = "other name(s), by links, of folders that are listed already"
PACKED = "compressed archive(s), which allow no random access: decompress them"
BROKEN = "link(s) that lead nowhere"

_KINDS: dict[str, tuple[Callable[[str], bool], str]] = {
    "folder": (is_image, "images"),
    "webdataset": (is_shard, ".tar shards"),
    "tfrecord": (is_records, ".tfrecord files"),
}


def open_source(
    root: str | Path,
    kind: str = "auto",
    *,
    patience: Patience = PATIENCE,
    listed_anew: Callable[[Iterable[str]], Sequence[str]] | None = None,
) -> Source:
    """Open the images below `root`: a folder or an s3://bucket/prefix, or one shard, TFRecord file or manifest there.

    kind: a value of data.source; "auto" detects it, a manifest first. patience: with an object store. listed_anew: no
    manifest is used, and this sorts the names of a folder, which may be too many for memory. Raises UserError where
    there is nothing, where there are several kinds and no choice, and for damage. What is left out is reported in one
    line on standard error, and is in the source's `left_out`.
    """
    source = _open(root, kind, patience, listed_anew)
    for line in (source.left_out.skipped_line(), source.left_out.line()):
        if line:
            tell_once(f"{root}: {line if line.startswith('skipped') else f'left out: {line}'}")
    return source


def _open(
    root: str | Path, kind: str, patience: Patience, listed_anew: Callable[[Iterable[str]], Sequence[str]] | None
) -> Source:
    if SOURCES.own(kind) is not None:
        return OwnSource(kind, str(root))
    storage, only = _place(str(root), patience)
    manifest = only if only is not None and is_manifest(only) else None
    if only is None and not listed_anew and storage.has(MANIFEST_FILE):
        manifest = MANIFEST_FILE
    if manifest is not None:
        return _of_manifest(storage, manifest, kind, patience)
    names: Sequence[str]
    if only is not None:
        names = [only, *(name for name in _companions(only) if storage.has(name))]
    else:
        names = storage.names() if listed_anew is None else listed_anew(storage.walk())
    chosen = _chosen(kind, names, storage)
    if chosen == "tfrecord":
        from iwm_fast.data.sources.tfrecord import TFRecordSource  # google-crc32c and protobuf: for these files only

        source: Source = TFRecordSource(storage, list(names))
    else:
        source = FolderSource(storage, _images(names)) if chosen == "folder" else WebDatasetSource(storage, list(names))
    if not len(source):
        why = f" ({source.left_out.line()})" if source.left_out.counts else ""
        raise UserError(f"{root} holds no image: its {_KINDS[chosen][1]} are without one{why}")
    if only is None:
        _count_others(source, names)
    return source


def _images(names: Sequence[str]) -> Sequence[str]:
    return names.only(is_image) if isinstance(names, SortedNames) else [name for name in names if is_image(name)]


def _count_others(source: Source, names: Sequence[str]) -> None:
    """Count the other files beside the images, except those of systems."""
    source.left_out.add(SYSTEM, *source.storage.system_folders)
    source.left_out.add(REPEATED, *source.storage.repeated_folders)
    if source.kind != "folder":
        source.left_out.add(PACKED, *filter(is_packed, names))
    links = (
        name for name in names if "." not in name.rpartition("/")[2] and Path(source.storage.shown(name)).is_symlink()
    )
    broken = {name for name in links if not source.storage.has(name)}
    source.left_out.add(BROKEN, *sorted(broken))
    for name in _unread(source.kind, names):
        if name not in broken:
            source.left_out.add_by_type(SKIPPED, name)


def _unread(kind: str, names: Sequence[str]) -> Iterator[str]:
    """Files that a source of this kind does not read and that are not reported otherwise."""
    wanted = _KINDS[kind][0]
    companions = {MANIFEST_FILE, SHARDS_FILE}
    if kind != "folder":
        companions.update(beside for name in names if wanted(name) for beside in _companions(name))
        companions.update(name for name in names if is_packed(name) or name.rsplit("/", 1)[-1] == CLASSES_FILE)
    return (name for name in names if not wanted(name) and name not in companions and not is_system(name))


def top_level(root: str | Path, patience: Patience = PATIENCE) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files directly below a root, sorted, without hidden ones.

    Both are empty where it is no folder, or cannot be listed: opening it reports why.
    """
    if is_address(str(root)):
        return S3Storage(str(root), patience).top()
    try:
        with os.scandir(root) as entries:
            seen = sorted((e.name, is_folder(e)) for e in entries if not e.name.startswith("."))
    except OSError:
        return [], []
    return [name for name, folder in seen if folder], [name for name, folder in seen if not folder]


def _place(root: str, patience: Patience) -> tuple[Storage, str | None]:
    """The storage, and the one file in it that was named, if any."""
    if not root:
        raise UserError("the folder of images is an empty text; give its path")  # Path("") would be the working folder
    if is_address(root):
        parent, _, last = root.rstrip("/").rpartition("/")
        if parent.count("/") >= 2 and (is_shard(last) or is_records(last) or is_manifest(last)):
            return S3Storage(parent, patience), last
        return S3Storage(root, patience), None
    path = Path(root)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of images")
    if path.is_dir():
        return LocalStorage(path), None
    if is_shard(path.name) or is_records(path.name) or is_manifest(path.name):
        return LocalStorage(path.parent), path.name
    raise UserError(f"{path} is not a folder; give a folder of images, or one .tar, .tfrecord or manifest .tsv file")


def _companions(name: str) -> tuple[str, ...]:
    """Names of files that may accompany a file."""
    return (*index_names(name), CLASSES_FILE) if is_shard(name) else record_index_names(name)


def _of_manifest(storage: Storage, name: str, kind: str, patience: Patience) -> Source:
    from iwm_fast.data.sources.changes import changes
    from iwm_fast.data.sources.manifest import ManifestSource, ManifestText  # google-crc32c: for manifests only

    shown = storage.shown(name)
    text = ManifestText(storage, name)
    root, images = text.header.root, storage
    if root != "." and not is_address(root) and not Path(root).exists():
        raise UserError(f"{shown}: its images were in {root}, which does not exist; index them where they are now")
    if root != ".":
        place, only = _place(root, patience)
        images = place if only is None else storage
    source = ManifestSource(images, storage, name, text)
    source.left_out.merge(changes(images, source))
    if kind not in ("auto", source.kind):
        raise UserError(f"{shown}: its images are of the kind {source.kind}, and data.source is {kind}; set it to auto")
    return source


def _chosen(kind: str, names: Sequence[str], storage: Storage) -> str:
    """The requested kind or, of all, the only one that there is."""
    counts = {name: sum(map(test, names)) for name, (test, _) in _KINDS.items()}
    there = [name for name in counts if counts[name]]
    known = ", ".join(sorted(EXTENSIONS))
    if kind != "auto":
        if not counts[kind]:
            raise UserError(
                f"{storage.root} holds no {_KINDS[kind][1]} among {len(names)} files; data.source is {kind}"
            )
        return kind
    if len(there) > 1:
        what = " and ".join(f"{counts[name]} {_KINDS[name][1]}" for name in there)
        raise UserError(f"{storage.root} holds {what}; set data.source to {' or '.join(there)}")
    if there:
        return there[0]
    packed = [name for name in names if is_packed(name)]
    if packed:
        raise UserError(
            f"{storage.root} holds {len(names)} files, none of them an image, a .tar shard or a .tfrecord file; "
            f"{len(packed)} are compressed ({packed[0]}), which allows no random access: decompress them"
        )
    if names:
        found = LeftOut()
        for name in names:
            found.add_by_type(SKIPPED, name)
        raise UserError(
            f"{storage.root} holds {len(names)} files ({found.types_line(SKIPPED)}), none of them an image by its "
            f"extension ({known}), "
            "a .tar shard or a .tfrecord file; give a folder of images"
        )
    raise UserError(f"{storage.root} is empty; give a folder of images ({known})")
