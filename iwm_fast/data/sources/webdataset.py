"""WebDataset: tar shards in which the members with the same name up to its first dot are a sample.

A shard is read by offset and length. They come from the DALI index beside it (as `wds2idx` writes it) if that matches
the shard, or from one walk over the shard's headers.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iwm_fast.data.decode.encoded import BadSample
from iwm_fast.data.sources.base import UNLABELLED, Labels, Unindexed, below_common_folders, folder_labels, number_labels
from iwm_fast.data.sources.kinds import is_member_image, is_shard
from iwm_fast.data.sources.left_out import LeftOut
from iwm_fast.data.sources.names import Names, unescape
from iwm_fast.data.sources.shard_index import Misfit, index_names, indexed_members
from iwm_fast.data.sources.storage import Storage
from iwm_fast.data.sources.tar import BLOCK, Member, agrees, key_of, members
from iwm_fast.errors import UserError

__all__ = ["CLASSES_FILE", "WebDatasetSource"]

CLASSES_FILE = "classes.txt"  # beside the shards: one class name per line, line n for label n of the .cls members
_LABELS, _SIDECARS = (".cls", ".class"), (".json",)
_JSON_KEYS = ("cls", "label", "class")
_WHOLE = re.compile(r"^(-?\d+)\.0+$")  # a whole number written as a float
# Annotations of an image in its key, recognized by their names: 1.mask.png beside 1.image.jpg.
_ANNOTATION = re.compile(r"\.(masks?|seg|segm|segmentation|semantic|instance|depth|trimap|gt)\.\w+$", re.IGNORECASE)

NO_IMAGE = "member(s) of a key without an image"
MASK = "mask(s), by their names, of a key with an image"
FURTHER = "image(s) with a longer extension, of a key with a plain one"
MISFIT = "index(es) that do not match their shard, which was read without"
NO_MEMBER = "shard(s) without an image"


@dataclass(slots=True)
class _Sample:
    image: Member
    label: Member | None


class WebDatasetSource(Unindexed):
    """The samples of the tar shards among the given names, shard after shard, each in its own order.

    Members of a shard belong together if their names agree up to the first dot of their last part, the key. Each
    image of a key is a sample. If some are KEY.EXTENSION, only those are, and KEY.more.EXTENSION (a mask, for example)
    is left out. A sample's class comes from one of:

    - the text of its `.cls` member; with `classes.txt` beside the shards, that line of it;
    - the first folder of its name, as in a folder of images, below the folders that all names share: `train/cat/1.jpg`
      of a tar of `train/` is a cat;
    - the `label` or `cls` of its `.json` member.
    """

    kind = "webdataset"

    def __init__(self, storage: Storage, names: list[str]) -> None:
        self.storage = storage
        self.left_out = LeftOut()
        self.files = [name for name in names if is_shard(name)]
        known = set(names)
        self._class_files = [_class_file(shard, known) for shard in self.files]
        with ThreadPoolExecutor(storage.readers) as pool:
            opened = list(pool.map(lambda shard: _open(storage, shard, known), self.files))
        for _, _, left_out in opened:
            self.left_out.merge(left_out)
        self._indexed = [indexed for _, indexed, _ in opened]
        samples = [sample for found, _, _ in opened for sample in found]
        self._shard = np.repeat(np.arange(len(opened), dtype=np.int32), [len(found) for found, _, _ in opened])
        self._offset = np.array([sample.image.offset for sample in samples], np.int64)
        self._size = np.array([sample.image.size for sample in samples], np.int64)
        self._members = Names.of(sample.image.name for sample in samples)
        spans = [
            (s.label.offset, s.label.size, s.label.name.lower().endswith(_SIDECARS)) if s.label else (-1, -1, 0)
            for s in samples
        ]
        self._label_spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._offset)

    def name(self, sample: int) -> str:
        """shard.tar:member."""
        return f"{self.files[self._shard[sample]]}:{self._members[sample]}"

    def read(self, sample: int) -> bytes:
        """The member's bytes."""
        if not self._size[sample]:
            raise BadSample("the member is empty")
        return self._bytes(sample, int(self._offset[sample]), int(self._size[sample]), of_image=True)

    def span(self, sample: int) -> tuple[str, int, int]:
        """The member, with its header where its offset comes from an index."""
        shard = int(self._shard[sample])
        ahead = BLOCK if self._indexed[shard] else 0
        return self.files[shard], int(self._offset[sample]) - ahead, ahead + int(self._size[sample])

    def unpack(self, sample: int, raw: bytes) -> bytes:
        """The member's bytes."""
        size = int(self._size[sample])
        if not size:
            raise BadSample("the member is empty")
        return self._checked(sample, raw, size, of_image=True)

    def size(self, sample: int) -> int:
        """The member's length."""
        return int(self._size[sample])

    def extent(self, sample: int) -> tuple[str, int | None]:
        """The shard, and the offset of the member's data in it."""
        return self.files[self._shard[sample]], int(self._offset[sample])

    @cached_property
    def labels(self) -> Labels:
        """From the `.cls` or `.json` members, one small read each, or from the names."""
        labelled = self._label_spans[:, 0] >= 0
        if not np.any(labelled & (self._label_spans[:, 2] == 0)):
            found = self._by_folders()
            if found[0] is not None or not np.any(labelled):
                return found
        with ThreadPoolExecutor(self.storage.readers) as pool:
            texts = list(pool.map(self._label_text, range(len(self))))
        if not any(texts):
            return self._by_folders()
        lists = {file: None if file is None else self._class_list(file) for file in self._class_files}
        if not any(lists.values()):
            return number_labels(texts)
        files = [self._class_files[shard] for shard in self._shard.tolist()]
        places = self._places(texts, files, lists)
        distinct = set(lists.values())
        if len(distinct) == 1:
            (classes,) = distinct
            return np.array([UNLABELLED if place is None else place for place in places], np.int64), classes or ()
        named = [lists[file] for file in files]
        return number_labels(
            [
                text if place is None or classes is None else classes[place]
                for text, place, classes in zip(texts, places, named, strict=True)
            ]
        )

    def shards(self) -> dict[str, int]:
        """Counted when they were listed."""
        return dict(zip(self.files, np.bincount(self._shard, minlength=len(self.files)).tolist(), strict=True))

    def describe(self) -> str:
        """Describe the source of the images."""
        return f"{len(self.files)} WebDataset shards"

    def _by_folders(self) -> Labels:
        return folder_labels(below_common_folders(self._members, self._shard.tolist()))

    def _places(
        self, texts: list[str], files: list[str | None], lists: dict[str | None, tuple[str, ...] | None]
    ) -> list[int | None]:
        """Return the line of the class list that each label means; None for no label, or no list."""
        known = {file: {name: place for place, name in reversed(list(enumerate(lists[file] or ())))} for file in lists}
        places: list[int | None] = []
        beyond: dict[str, list[int]] = {}
        for sample, (text, file) in enumerate(zip(texts, files, strict=True)):
            classes = lists[file]
            if not text or file is None or classes is None:
                places.append(None)
            elif text.removeprefix("-").isdecimal():
                places.append(int(text))
                if not 0 <= int(text) < len(classes):
                    beyond.setdefault(file, []).append(int(text))
            elif text in known[file]:
                places.append(known[file][text])
            else:
                raise UserError(
                    f"{self.storage.shown(self.name(sample))}: its label {text[:40]!r} is neither a whole number nor a "
                    f"line of {self.storage.shown(file)}; fix the shard, or remove that list"
                )
        for file, values in beyond.items():
            raise UserError(
                f"{self.storage.shown(file)} has {len(lists[file] or ())} lines, but there are labels from "
                f"{min(values)} to {max(values)}; fix or remove it"
            )
        return places

    def _class_list(self, file: str) -> tuple[str, ...]:
        """Read a list of classes; its lines are escaped by `names.escape`."""
        try:
            text = self.storage.read(file).decode("utf-8-sig", "surrogateescape")
        except BadSample as bad:
            raise UserError(f"{self.storage.shown(file)}: {bad.reason}; fix or remove it") from bad
        found: dict[str, int] = {}
        for place, line in enumerate(text.rstrip("\r\n").split("\n")):
            name = unescape(line.removesuffix("\r"))
            found[f"{name} ({place})" if name in found else name] = place  # two of ImageNet's classes are "crane"
        return tuple(found)

    def _label_text(self, sample: int) -> str:
        offset, size, sidecar = self._label_spans[sample].tolist()
        if offset < 0:
            return ""
        try:
            text = self._bytes(sample, offset, size, of_image=False).decode("utf-8-sig").strip()
        except (BadSample, UnicodeDecodeError) as error:
            raise UserError(f"{self.storage.shown(self.name(sample))}: its label cannot be read: {error}") from error
        return _label_in(text) if sidecar else _WHOLE.sub(r"\1", text)

    def _bytes(self, sample: int, offset: int, size: int, *, of_image: bool) -> bytes:
        """Read a member, with its header where its offset comes from an index."""
        shard = int(self._shard[sample])
        ahead = BLOCK if self._indexed[shard] else 0
        raw = self.storage.read(self.files[shard], offset - ahead, ahead + size)
        return self._checked(sample, raw, size, of_image=of_image)

    def _checked(self, sample: int, raw: bytes, size: int, *, of_image: bool) -> bytes:
        """A member's bytes, of those read. If its offset comes from an index, the header before them must agree."""
        ahead = BLOCK if self._indexed[self._shard[sample]] else 0
        if len(raw) != ahead + size:
            raise BadSample(f"its shard ends {ahead + size - len(raw)} bytes before the member does")
        if not ahead:
            return raw
        member = self._members[sample]
        if not agrees(raw[:ahead], member if of_image else key_of(member), size, whole=of_image):
            raise BadSample(
                "its shard has another member there: the shard changed, or its index belongs to another shard"
            )
        return raw[ahead:]


def _open(storage: Storage, shard: str, known: set[str]) -> tuple[list[_Sample], bool, LeftOut]:
    """Return (samples of one shard, whether they come from an index, what was left out)."""
    left_out = LeftOut()
    found, misfits = None, []
    for index in index_names(shard):
        if found is None and index in known:
            try:
                found = indexed_members(storage, shard, index, left_out)
            except (Misfit, BadSample):
                misfits.append(index)
    indexed = found is not None
    if found is None:
        left_out.add(MISFIT, *misfits)
        found = members(storage, shard, left_out)
    samples = _samples(found, shard, left_out)
    if not samples:
        left_out.add(NO_MEMBER, shard)
    return samples, indexed, left_out


def _samples(found: list[Member], shard: str, left_out: LeftOut) -> list[_Sample]:
    groups: dict[str, list[Member]] = {}
    for member in found:
        groups.setdefault(key_of(member.name), []).append(member)
    samples = []
    for key, group in groups.items():
        images = [member for member in group if is_member_image(member.name)]
        seen = [member for member in images if not _ANNOTATION.search(member.name[len(key) :])]
        if seen and len(seen) < len(images) and not any(member.name.rfind(".") == len(key) for member in images):
            left_out.add(MASK, *(f"{shard}:{member.name}" for member in images if member not in seen))
            images = seen
        plain = [member for member in images if member.name.rfind(".") == len(key)]
        if not images:
            left_out.add_by_type(NO_IMAGE, *(f"{shard}:{member.name}" for member in group))
        if plain and len(plain) < len(images):
            left_out.add(
                FURTHER, *(f"{shard}:{member.name}" for member in images if member.name.rfind(".") != len(key))
            )
        beside = {member.name[len(key) :].lower(): member for member in group}
        samples += [_Sample(image, _label_beside(image.name[len(key) :], beside)) for image in plain or images]
    return samples


def _label_beside(image: str, beside: dict[str, Member]) -> Member | None:
    """Return the member with an image's label: of its own name (1.left.cls for 1.left.jpg), or of its key (1.cls)."""
    own = image[: image.rfind(".")].lower()
    names = (start + end for ends in (_LABELS, _SIDECARS) for start in (own, "") for end in ends)
    return next((beside[name] for name in names if name in beside), None)


def _label_in(text: str) -> str:
    """Return the label in a JSON member, a text or a whole number; "" if there is none, or several."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(found, dict):
        return ""
    value = next((found[key] for key in _JSON_KEYS if found.get(key) is not None), "")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():  # as pandas writes an integer column with missing values
        value = int(value)
    return str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""


def _class_file(shard: str, known: set[str]) -> str | None:
    """Return the class list of a shard: in its own folder, or at the root."""
    folder = shard.rpartition("/")[0]
    return next((name for name in (f"{folder}/{CLASSES_FILE}".lstrip("/"), CLASSES_FILE) if name in known), None)
