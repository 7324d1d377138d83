"""Checkpoints that do not depend on how a run was sharded, and that load without unpickling: format and reading.

A checkpoint is a folder ``step_000123``: one safetensors file per rank with that rank's fragments of the fp32 weights,
the optimizer's moments and the target's EMA; ``index.json`` with the layout; ``manifest.json`` with the size and
SHA-256 of every file. ``latest`` beside the folders names the newest; weights that a run never changes lie
beside them once (`frozen_file`). See docs/reference/checkpoints.md; ``writer`` writes it.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iwm_fast.engine.checkpoint.frozen_file import FrozenFile, frozen_fault, frozen_of
from iwm_fast.engine.checkpoint.index import FORMAT, FORMATS, read_index
from iwm_fast.engine.checkpoint.shard_file import ShardReader, file_sum, shard_fault
from iwm_fast.errors import UserError, because

__all__ = [
    "FORMAT",
    "INDEX",
    "LATEST",
    "MANIFEST",
    "Checkpoint",
    "FileFault",
    "Fragment",
    "damage",
    "file_fault",
    "newest",
    "step_of",
    "steps",
]

INDEX, MANIFEST, LATEST = "index.json", "manifest.json", "latest"
_FOLDER = re.compile(r"step_(\d{6,})")
_MOST_OPEN = 64  # files; a process may have a thousand
_FILE = re.compile(r"\w[\w.-]*")
# Errors of reading that do not mean damage: permissions, this process's limits, a server.
_NOT_OF_THE_FILE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)


@dataclass(frozen=True)
class Fragment:
    """A contiguous 1-D part, fp32, of the ``kind`` (weight, exp_avg, exp_avg_sq, ema) of parameter ``name``."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor

    @property
    def key(self) -> str:
        """Its key in a safetensors file."""
        return f"{self.kind}/{self.name}@{self.start}"


def file_fault(path: Path, files: Mapping[str, Any]) -> str | None:
    """Return which of some files of a checkpoint is missing or has other bytes than a manifest's, and how, or None.

    Raises UserError where this process may not read it.
    """
    for file, expected in files.items():
        try:
            found = file_sum(path / file)
        except (OSError, ValueError) as error:
            _require_readable(path / file, error)
            return f"{file}: {getattr(error, 'strerror', None) or error}"
        if found != expected:
            return f"{file}: its bytes are not those that were written (SHA-256 differs)"
    return None


FileFault = Callable[[Path, Mapping[str, Any]], str | None]


def damage(path: Path, fault: FileFault = file_fault) -> str | None:
    """Return what is wrong with the checkpoint at ``path``, or None where it is intact.

    Finds missing, resized or altered files, and an index that contradicts itself or its shards, whatever the checksums
    say. fault: what hashes the files, `file_fault` or all ranks (`shared_check`). Raises UserError where this process
    may not read it, so that no checkpoint is skipped for that.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _require_readable(path / MANIFEST, error)
        return f"{MANIFEST}: {error}"
    if version not in FORMATS:
        return f"{MANIFEST}: format is {version!r}, this version reads {FORMAT!r}"
    odd = next((file for file in files if not _FILE.fullmatch(file)), None)
    if odd is not None:
        return f"{MANIFEST}: {odd!r} is not a file of this folder"
    wrong = fault(path, files)
    if wrong is not None:
        return wrong
    if INDEX not in files:
        return f"{MANIFEST}: does not list {INDEX}"
    return _contradiction(path, files)


def _require_readable(path: Path, error: Exception) -> None:
    """Raise UserError where an error comes from this process or the server, not from the file."""
    if isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE:
        raise UserError(f"{path}: cannot be read ({because(error)}), then start again") from error


def _contradiction(path: Path, files: dict[str, Any]) -> str | None:
    try:
        index = read_index(path / INDEX)
    except (OSError, ValueError) as error:
        return f"{INDEX}: {error}"
    step = index.document["step"]
    named = step_of(path)
    if named is not None and named != step:
        return f"{INDEX}: is of step {step}, the folder is named {path.name}"
    for file, lengths in index.held():
        if file not in files:
            return f"{MANIFEST}: does not list {file}, which {INDEX} names"
        wrong = shard_fault(path / file, lengths, {"step": str(step)}, index.document.get("headers", {}).get(file))
        if wrong:
            return f"{file}: {wrong}"
    try:
        return frozen_fault(path, index.document)
    except OSError as error:
        _require_readable(path.parent, error)
        return f"frozen weights: {error}"


def newest(root: Path, fault: FileFault = file_fault) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint below ``root`` (``latest``, if intact) and the skipped ones with reasons.

    fault: as for `damage`.
    """
    passed: list[str] = []
    for path in steps(root):
        wrong = damage(path, fault)
        if wrong is None:
            return path, passed
        passed.append(f"{path}: {wrong}")
    return None, passed


def steps(root: Path) -> list[Path]:
    """Return the checkpoints below ``root`` in the order in which a resume tries them.

    First ``latest``, then older ones from the newest on, then newer ones, which a kill or a resume from an older one
    left.
    """
    found = sorted(((n, p) for p in root.glob("step_*") if (n := step_of(p)) is not None and p.is_dir()), reverse=True)
    latest = root / LATEST
    try:
        # A link to a checkpoint made by hand counts too.
        named = step_of(latest.resolve() if latest.is_dir() else root / latest.read_text().strip())
    except (OSError, ValueError):
        named = None
    if named is None:
        return [p for _, p in found]
    return [p for n, p in found if n <= named] + [p for n, p in found if n > named]


def step_of(path: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None for another name."""
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


class Checkpoint:
    """Read any range of any tensor of a checkpoint, however it was sharded, and no other bytes of its files.

    Checks that each file's header is the one that was written; `damage` checks every byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._places = read_index(path / INDEX)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable checkpoint ({error}); name a folder step_NNNNNN") from error
        self.index, self.shapes = self._places.document, self._places.shapes
        self._headers: dict[str, str] = self.index.get("headers", {})
        self._open: dict[str, ShardReader] = {}
        self.bytes_read = 0  # of the ranks' files: headers and ranges
        self.frozen: FrozenFile | None = frozen_of(path, self.index)

    @property
    def step(self) -> int:
        """The number of steps done."""
        return int(self.index["step"])

    @property
    def updates(self) -> int:
        """The number of updates of the optimizer's moments: steps minus skipped ones."""
        return int(self.index["updates"])

    def fill(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Copy elements ``start`` … of the flattened tensor into ``out`` (1-D). Raises UserError where some are
        missing.
        """
        self.fill_all([(kind, name, start, out)])

    def fill_all(self, wanted: Iterable[tuple[str, str, int, Tensor]]) -> None:
        """Do what `fill` does for many ranges, file by file: each is opened once."""
        parts: dict[str, list[tuple[str, int, Tensor]]] = {}
        for kind, name, start, out in wanted:
            tensor, stop, filled = f"{kind}/{name}", start + out.numel(), 0
            for piece in self._places.pieces(tensor, start, stop):
                a, b = max(start, piece.start), min(stop, piece.start + piece.length)
                part = (f"{tensor}@{piece.start}", a - piece.start, out[a - start : b - start])
                parts.setdefault(piece.file, []).append(part)
                filled += b - a
            if filled != out.numel():
                raise UserError(
                    f"{self.path}: {kind} of {name} is incomplete "
                    f"({filled} of {out.numel()} elements); use another checkpoint"
                )
        for file, own in parts.items():
            for key, first, out in own:
                self._read(file, key, first, out)

    def full(self, kind: str, name: str) -> Tensor:
        """Return the whole tensor in its own shape, fp32, on the CPU. Raises UserError where it is missing."""
        shape = self.require_shape(kind, name)
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        self.fill(kind, name, 0, flat)
        return flat.view(shape)

    def require_shape(self, kind: str, name: str, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a tensor's sizes. Raises UserError where it is missing, or not of the given ones."""
        found = self.shapes.get(f"{kind}/{name}")
        if found is None:
            raise UserError(
                f"{self.path}: there is no {kind} of {name}; use another checkpoint, or its own config.yaml"
            )
        if shape not in (None, found):
            raise UserError(
                f"{self.path}: {kind} of {name} is {_said(found)}, not {_said(shape)}; use its own config.yaml"
            )
        return found

    def names(self, kind: str) -> list[str]:
        """Return the parameters that have a ``kind``."""
        return [key.removeprefix(f"{kind}/") for key in self.shapes if key.startswith(f"{kind}/")]

    def require_architecture(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the weights are exactly those of a model with ``shapes``."""
        mine = {name: self.shapes[f"weight/{name}"] for name in self.names("weight")}
        for name in sorted(mine.keys() | shapes.keys()):
            if mine.get(name) != shapes.get(name):
                raise UserError(
                    f"{self.path}: checkpoint of another architecture: {name} is {_said(mine.get(name))} there and "
                    f"{_said(shapes.get(name))} in this configuration; use its own config.yaml"
                )

    def _read(self, file: str, key: str, first: int, out: Tensor) -> None:
        direct = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
        part = out if direct else torch.empty(out.numel(), dtype=torch.float32)
        try:
            shard = self._open.get(file) or self._opened(file)
            before = shard.bytes_read
            shard.read(key, first, part)
            self.bytes_read += shard.bytes_read - before
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / file}: cannot be read ({error}); use another checkpoint") from error
        if not direct:
            out.copy_(part)

    def _opened(self, file: str) -> ShardReader:
        if len(self._open) >= _MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        shard = ShardReader(self.path / file)
        if self._headers.get(file, shard.header_sha256) != shard.header_sha256:
            shard.close()
            raise ValueError("its header is not the one that was written (SHA-256 differs)")
        self.bytes_read += shard.bytes_read
        self._open[file] = shard
        return shard


def _said(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a scalar"
