"""Write checkpoints beside the training: from a snapshot in host memory, in a thread of each rank.

A checkpoint is written under a hidden name, synced and renamed; ``latest`` moves last, and a pruned one is renamed
before it is deleted. So a kill at any instant leaves only intact checkpoints under final names.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iwm_fast.atomic_files import sync, write_whole_text
from iwm_fast.engine.checkpoint.format import FORMAT, INDEX, LATEST, MANIFEST, Fragment, step_of, steps
from iwm_fast.engine.checkpoint.frozen_file import FROZEN_FILE
from iwm_fast.engine.checkpoint.shard_file import file_sum, write_shard
from iwm_fast.engine.distributed.ranks import Ranks, gather
from iwm_fast.errors import UserError, because

__all__ = ["CheckpointWriter", "clear_leftovers", "point_latest", "write"]

_PARTIAL, _REMOVED = ".partial", ".removed"


class CheckpointWriter:
    """Write one checkpoint at a time while training continues; all ranks call the same methods in the same order.

    Host memory: one snapshot of this rank's fragments, allocated by the first ``save`` and reused by the next, which
    waits for the previous writing.
    """

    def __init__(self, root: Path, ranks: Ranks, keep_last: int, keep_every: int | None) -> None:
        self._root, self._ranks, self._keep_last, self._keep_every = root, ranks, keep_last, keep_every
        # The threads' messages must not mix with those of the step, so they have their own process group, on the host.
        self._group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="iwm-fast checkpoint")
        self._pending: Future[Path] | None = None
        self._host: dict[str, Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the last writing failed; ``wait`` raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(self, step: int, fragments: Iterable[Fragment], meta: dict[str, Any]) -> None:
        """Copy the state to the host and let the thread write it. Raises the error of the previous writing."""
        self.wait()
        snapshot = self._copy(fragments)
        self._pending = self._thread.submit(
            write, self._root, step, snapshot, meta, self._ranks, self._keep_last, self._keep_every, self._group
        )

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk. Raises UserError on every rank where any could not write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread after the current writing."""
        self._thread.shutdown()

    @torch.no_grad()
    def _copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        copies = []
        for part in fragments:
            host = self._host.get(part.key)
            if host is None:
                host = torch.empty(part.tensor.numel(), dtype=torch.float32, pin_memory=part.tensor.is_cuda)
                self._host[part.key] = host
            host.copy_(part.tensor.detach().view(-1), non_blocking=True)
            copies.append(Fragment(part.kind, part.name, part.shape, part.start, host))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return copies


def write(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    meta: dict[str, Any],
    ranks: Ranks,
    keep_last: int,
    keep_every: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write checkpoint ``root/step_NNNNNN`` from all ranks' fragments (fp32, CPU) and point ``latest`` to it.

    All ranks call it. The newest ``keep_last`` checkpoints stay, and those whose step is a multiple of ``keep_every``.
    Raises UserError on every rank where any rank could not write; then nothing is left under a final name.
    """
    final = root / f"step_{step:06d}"
    partial = root / f".{final.name}{_PARTIAL}"
    failed = gather(_begin(partial) if ranks.first else None, ranks.world, group)[0]
    reports: list[dict[str, Any]] = []
    if failed is None:
        reports = gather(_write_rank(partial, step, fragments, ranks), ranks.world, group)
        failed = next((r["error"] for r in reports if r["error"]), None)
        if failed is None and ranks.first:
            failed = _finish(partial, final, {"format": FORMAT, "step": step, **meta}, reports, keep_last, keep_every)
        failed = gather(failed, ranks.world, group)[0]
    if failed is not None:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: checkpoint could not be written ({failed}); the checkpoints before it stay; "
            "fix this, then --resume auto"
        )
    return final


def clear_leftovers(root: Path) -> None:
    """Delete what a killed writer left under hidden names. Call it while the run is locked."""
    for path in (*root.glob(f".step_*{_PARTIAL}"), *root.glob(f".step_*{_REMOVED}")):
        shutil.rmtree(path, ignore_errors=True)
    (root / f".{FROZEN_FILE}{_PARTIAL}").unlink(missing_ok=True)


def point_latest(root: Path, name: str) -> None:
    """Point ``latest`` to a checkpoint atomically. An existing link is replaced, not followed."""
    latest = root / LATEST
    if latest.is_symlink():
        latest.unlink()
    write_whole_text(latest, name + "\n")


def _begin(partial: Path) -> str | None:
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()  # no parents: the mount point of a lost disk has another folder beneath
    except OSError as error:
        return _said(0, error)
    return None


def _said(rank: int, error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    gone = "the run's folder is gone: look whether its disk is mounted" if error.errno == errno.ENOENT else ""
    return f"rank {rank}: {where}{because(error, gone)}"


def _write_rank(partial: Path, step: int, fragments: Iterable[Fragment], ranks: Ranks) -> dict[str, Any]:
    """Write the rank's shard; return what the index needs of it, or the error."""
    file = f"rank_{ranks.rank:05d}.safetensors"
    parts = list(fragments)
    report: dict[str, Any] = {
        "error": None,
        "files": {},
        "shapes": {f"{p.kind}/{p.name}": list(p.shape) for p in parts},
        "fragments": [[p.kind, p.name, p.start, p.tensor.numel(), file] for p in parts],
    }
    metadata = {"format": FORMAT, "step": str(step), "rank": str(ranks.rank)}
    try:
        report["files"][file] = write_shard(partial / file, {p.key: p.tensor.detach() for p in parts}, metadata)
    except OSError as error:
        report["error"] = _said(ranks.rank, error)
    return report


def _finish(
    partial: Path,
    final: Path,
    meta: dict[str, Any],
    reports: list[dict[str, Any]],
    keep_last: int,
    keep_every: int | None,
) -> str | None:
    """Write index and manifest, rename, move ``latest``, prune. Returns the error, if any."""
    index = meta | {
        "shapes": {name: shape for r in reports for name, shape in r["shapes"].items()},
        "fragments": [f for r in reports for f in r["fragments"]],
    }
    try:
        write_whole_text(partial / INDEX, json.dumps(index))
        files = {file: entry for r in reports for file, entry in r["files"].items()}
        files[INDEX] = file_sum(partial / INDEX)
        write_whole_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync(partial)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        partial.rename(final)
        sync(final.parent)
        point_latest(final.parent, final.name)
        _prune(final, keep_last, keep_every)
    except OSError as error:
        return _said(0, error)
    return None


def _prune(final: Path, keep_last: int, keep_every: int | None) -> None:
    number = step_of(final) or 0
    older = [(n, p) for p in steps(final.parent) if (n := step_of(p)) is not None and n < number]
    for step, path in older[keep_last - 1 :]:
        if keep_every is None or step % keep_every:
            try:
                _remove(path)
            except OSError as error:  # the new checkpoint is intact, whatever happens to an old one
                print(f"{path}: old checkpoint not removed ({because(error)})", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    """Rename it first, so that no part of it is ever found under its final name."""
    aside = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        (path / MANIFEST).unlink(missing_ok=True)  # an overlay cannot rename files of an image: no longer intact
        aside = path
    shutil.rmtree(aside)
