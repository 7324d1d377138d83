"""Checkpoints that do not depend on how a run was divided, and that loading never unpickles.

A checkpoint is a folder ``step_000123``: one safetensors file a rank with that rank's fragments of the fp32 weights,
AdamW's moments and the target's average; ``index.json`` with where each fragment belongs; ``manifest.json`` with the
size and SHA-256 of every file. It is written beside its place, synced, and renamed; ``latest`` moves last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iwm_fast.engine.distributed import Ranks
from iwm_fast.errors import UserError

__all__ = ["Checkpoint", "Fragment", "damage", "newest", "write"]

FORMAT = "iwm-fast-checkpoint/1"
INDEX, MANIFEST, LATEST = "index.json", "manifest.json", "latest"


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
        """Its name inside a safetensors file."""
        return f"{self.kind}/{self.name}@{self.start}"


def write(
    root: Path, step: int, fragments: Iterable[Fragment], meta: dict[str, Any], ranks: Ranks, keep_last: int
) -> Path:
    """Write checkpoint ``root/step_NNNNNN`` from all ranks' fragments and let ``latest`` name it; all ranks call it.

    Raises UserError on every rank when any rank could not write; nothing is left under a final name then.
    """
    final = root / f"step_{step:06d}"
    partial = root / f".{final.name}.partial"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _meet(ranks)
    report: dict[str, Any] = {"rank": ranks.rank, "error": None, "files": {}, "fragments": [], "shapes": {}}
    try:
        _write_rank(partial, fragments, report)
    except (OSError, SafetensorError) as error:
        report["error"] = f"rank {ranks.rank}: {error}"
    reports = _gather(report, ranks)
    failed = [r["error"] for r in reports if r["error"]]
    if not failed and ranks.first:
        try:
            _finish(partial, final, {"format": FORMAT, "step": step, **meta}, reports, keep_last)
        except OSError as error:
            failed = [f"rank 0: {error}"]
    failed = _gather(failed, ranks)[0]
    if failed:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: checkpoint could not be written ({failed[0]}); free space or mend the folder, then --resume auto"
        )
    return final


def _write_rank(partial: Path, fragments: Iterable[Fragment], report: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    file = f"rank_{report['rank']:05d}.safetensors"
    for fragment in fragments:
        tensors[fragment.key] = fragment.tensor.detach().to("cpu", torch.float32).contiguous()
        report["shapes"][f"{fragment.kind}/{fragment.name}"] = list(fragment.shape)
        report["fragments"].append([fragment.kind, fragment.name, fragment.start, fragment.tensor.numel(), file])
    save_file(tensors, partial / file)
    _sync(partial / file)
    report["files"][file] = _sum(partial / file)


def _finish(partial: Path, final: Path, meta: dict[str, Any], reports: list[dict[str, Any]], keep_last: int) -> None:
    index = meta | {
        "shapes": {name: shape for r in reports for name, shape in r["shapes"].items()},
        "fragments": [f for r in reports for f in r["fragments"]],
    }
    _write_text(partial / INDEX, json.dumps(index))
    files = {file: entry for r in reports for file, entry in r["files"].items()} | {INDEX: _sum(partial / INDEX)}
    _write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(partial)
    if final.exists():  # the same step again, after a resume from an older one
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)
    aside = final.parent / f".{LATEST}.partial"
    _write_text(aside, final.name + "\n")
    aside.replace(final.parent / LATEST)
    _sync(final.parent)
    older = [p for p in _steps(final.parent) if p != final]
    for path in older[max(0, keep_last - 1) :]:
        shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path`` (missing, resized or altered file), or None when it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST}: format is {manifest.get('format')!r}, this version reads {FORMAT!r}"
    for file, expected in files.items():
        try:
            found = _sum(path / file)
        except OSError as error:
            return f"{file}: {error.strerror}"
        if found != expected:
            return f"{file}: its bytes are not those that were written (SHA-256 differs)"
    return None


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below ``root`` (the one ``latest`` names, if whole) and what was passed over, with
    reasons.
    """
    candidates = _steps(root)
    passed: list[str] = []
    for path in candidates:
        wrong = damage(path)
        if wrong is None:
            return path, passed
        passed.append(f"{path}: {wrong}")
    return None, passed


class Checkpoint:
    """Reads any range of any tensor of a checkpoint, whatever division wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.index: dict[str, Any] = json.loads((path / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable checkpoint ({error}); name a folder step_NNNNNN") from error
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(v) for k, v in self.index["shapes"].items()}
        self._where: dict[str, list[tuple[int, int, str]]] = {}
        for kind, name, start, length, file in self.index["fragments"]:
            self._where.setdefault(f"{kind}/{name}", []).append((start, length, file))
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.index["step"])

    def fill(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Copy elements ``start`` … of the flattened tensor into ``out`` (1-D). Raises UserError when some are
        missing.
        """
        stop, filled = start + out.numel(), 0
        for first, length, file in self._where.get(f"{kind}/{name}", []):
            a, b = max(start, first), min(stop, first + length)
            if a < b:
                part = self._file(file).get_slice(f"{kind}/{name}@{first}")[a - first : b - first]
                out[a - start : b - start].copy_(part)
                filled += b - a
        if filled != out.numel():
            raise UserError(
                f"{self.path}: {kind} of {name} is incomplete "
                f"({filled} of {out.numel()} elements); use another checkpoint"
            )

    def full(self, kind: str, name: str) -> Tensor:
        """The whole tensor in its own shape, fp32, on the CPU."""
        shape = self.shapes[f"{kind}/{name}"]
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        self.fill(kind, name, 0, flat)
        return flat.view(shape)

    def names(self, kind: str) -> list[str]:
        """The parameters of which there is a ``kind``."""
        return [key.removeprefix(f"{kind}/") for key in self.shapes if key.startswith(f"{kind}/")]

    def require_architecture(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the checkpoint's weights are exactly those of a model with ``shapes``."""
        mine = {name: self.shapes[f"weight/{name}"] for name in self.names("weight")}
        for name in sorted(mine.keys() | shapes.keys()):
            if mine.get(name) != shapes.get(name):
                raise UserError(
                    f"{self.path}: checkpoint of another architecture: {name} is {_said(mine.get(name))} there and "
                    f"{_said(shapes.get(name))} in this configuration; use its own config.yaml"
                )

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file]


def _said(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a scalar"


def _steps(root: Path) -> list[Path]:
    """Checkpoints below ``root``: the one ``latest`` names first, then the newest first."""
    found = sorted((p for p in root.glob("step_*") if p.is_dir()), key=lambda p: p.name, reverse=True)
    try:
        named = root / (root / LATEST).read_text().strip()
    except OSError:
        return found
    return [named, *(p for p in found if p != named)] if named in found else found


def _meet(ranks: Ranks) -> None:
    if ranks.world > 1:
        dist.barrier()


def _gather(value: Any, ranks: Ranks) -> list[Any]:
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def _sum(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
