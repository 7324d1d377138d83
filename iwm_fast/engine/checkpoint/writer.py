"""Write checkpoints beside the training: from a snapshot in host memory, in a thread of each rank.

A checkpoint is written under a hidden name, synced and renamed; ``latest`` moves last, and a pruned one is renamed
before it is deleted. So a kill at any instant leaves only intact checkpoints under final names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iwm_fast.atomic_files import link_or_copy, sync, whole_folder, write_whole_text
from iwm_fast.engine.checkpoint.format import FORMAT, INDEX, LATEST, MANIFEST, Fragment, step_of, steps
from iwm_fast.engine.checkpoint.frozen_file import FROZEN_FILE
from iwm_fast.engine.checkpoint.index import equal_part, shard_name
from iwm_fast.engine.checkpoint.shard_file import ShardReader, file_sum, write_shard
from iwm_fast.engine.distributed.messages import bytes_of_first, reports_to_first
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError, because

__all__ = ["CheckpointWriter", "adopt_checkpoint", "clear_leftovers", "layout", "places", "point_latest", "write"]

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

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        meta: dict[str, Any],
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Copy the state to the host and let the thread write it. Raises the error of the previous writing.

        ``shapes``: of all ranks' tensors, as for `write`.
        """
        self.wait()
        snapshot = self._copy(fragments)
        self._pending = self._thread.submit(
            write, self._root, step, snapshot, meta, self._ranks, self._keep_last, self._keep_every, self._group, shapes
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
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Write checkpoint ``root/step_NNNNNN`` from all ranks' fragments (fp32, CPU) and point ``latest`` to it.

    All ranks call it. ``shapes``: KIND/NAME → sizes of the tensors that all ranks hold together, the same on each; by
    default those of this rank's fragments. The newest ``keep_last`` checkpoints stay, and those whose step is a
    multiple of ``keep_every``. Raises UserError on every rank where any rank could not write; then nothing is left
    under a final name.
    """
    final = root / f"step_{step:06d}"
    partial = root / f".{final.name}{_PARTIAL}"
    failed = _of_first((_begin(partial) or "") if ranks.first else "", ranks, group)
    if not failed:
        parts = list(fragments)
        table = {tensor: list(shape) for tensor, shape in (shapes or _shapes(parts)).items()}
        mine = json.dumps(_write_rank(partial, step, parts, ranks, table)).encode()
        reports = [json.loads(text) for text in reports_to_first(mine, ranks.rank, ranks.world, group)]
        if ranks.first:
            failed = next((r["error"] for r in reports if r["error"]), "")
        if ranks.first and not failed:
            meta = {"format": FORMAT, "step": step, **meta}
            failed = _finish(partial, final, meta, table, reports, keep_last, keep_every) or ""
        failed = _of_first(failed, ranks, group)
    if failed:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: checkpoint could not be written ({failed}); the checkpoints before it stay; "
            "fix this, then --resume auto"
        )
    return final


def _of_first(text: str, ranks: Ranks, group: dist.ProcessGroup | None) -> str:
    sent = bytes_of_first(text.encode(errors="surrogateescape"), ranks.rank, ranks.world, group)
    return sent.decode(errors="surrogateescape")


def _shapes(parts: Sequence[Fragment]) -> dict[str, tuple[int, ...]]:
    return {f"{part.kind}/{part.name}": part.shape for part in parts}


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


def adopt_checkpoint(checkpoint: Path, root: Path) -> None:
    """Give a new run the checkpoint of another that it resumes from, linked or copied: stopped before a checkpoint of
    its own it resumes from this one. UserError where it cannot be written.
    """
    own = root / checkpoint.resolve().name
    if own.exists():
        return
    try:
        with whole_folder(own) as partial:
            for file in checkpoint.iterdir():
                link_or_copy(file, partial / file.name)
    except OSError as error:
        raise UserError(f"{own}: cannot be written ({because(error)})") from error
    point_latest(root, own.name)


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


def _write_rank(
    partial: Path, step: int, parts: Sequence[Fragment], ranks: Ranks, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Write the rank's shard; return what the index needs of it, or the error."""
    own: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        own.setdefault(f"{part.kind}/{part.name}", []).append((part.start, part.tensor.numel()))
    report = {"error": None, **places(own, ranks.rank, ranks.world, shapes)}
    metadata = {"format": FORMAT, "step": str(step), "rank": str(ranks.rank)}
    path = partial / shard_name(ranks.rank)
    try:
        report["sums"] = write_shard(path, {part.key: part.tensor.detach() for part in parts}, metadata)
        with ShardReader(path) as shard:
            report["header"] = shard.header_sha256
    except OSError as error:
        report["error"] = _said(ranks.rank, error)
    return report


def places(
    own: Mapping[str, list[tuple[int, int]]], rank: int, world: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return a rank's part of the layout: (start, length) of the tensors of which it holds another part than an equal
    one, and a bit for each tensor of whether it does.
    """
    if not shapes.keys() >= own.keys():
        raise ValueError(f"shapes lacks {min(own.keys() - shapes.keys())}, of which this rank has a fragment")
    equal = [own.get(tensor, []) == _equal(math.prod(shape), rank, world) for tensor, shape in shapes.items()]
    return {
        "table": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "equal": np.packbits(np.array(equal, dtype=bool)).tobytes().hex(),
        "other": {tensor: own[tensor] for tensor, e in zip(shapes, equal, strict=True) if not e and tensor in own},
    }


def _equal(elements: int, rank: int, world: int) -> list[tuple[int, int]]:
    """The fragments of a rank that holds an equal part of a tensor: one, or none."""
    part = equal_part(elements, world)
    start = part * rank
    return [(start, min(part, elements - start))] if start < elements else []


def _finish(
    partial: Path,
    final: Path,
    meta: dict[str, Any],
    shapes: Mapping[str, Sequence[int]],
    reports: list[dict[str, Any]],
    keep_last: int,
    keep_every: int | None,
) -> str | None:
    """Write index and manifest, rename, move ``latest``, prune. Returns the error, if any."""
    unlike = [rank for rank, report in enumerate(reports) if report["table"] != reports[0]["table"]]
    if unlike:
        return f"rank {unlike[0]} names other tensors than rank 0"
    dealt, listed = layout(shapes, reports)
    headers = {shard_name(rank): report["header"] for rank, report in enumerate(reports)}
    index = meta | {"shards": len(reports), "shapes": shapes, "dealt": dealt, "fragments": listed, "headers": headers}
    try:
        write_whole_text(partial / INDEX, json.dumps(index))
        files = {shard_name(rank): report["sums"] for rank, report in enumerate(reports)}
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


def layout(
    shapes: Mapping[str, Sequence[int]], reports: list[dict[str, Any]]
) -> tuple[dict[str, int], dict[str, list[tuple[int, int, int]]]]:
    """Return the tensors of which all ranks hold equal parts, with the elements of one, and the others' fragments as
    (start, length, rank).
    """
    world, count = len(reports), len(shapes)
    bits = np.frombuffer(bytes.fromhex("".join(report["equal"] for report in reports)), dtype=np.uint8)
    equal = np.unpackbits(bits.reshape(world, -1), axis=1, count=count).astype(bool)
    dealt: dict[str, int] = {}
    listed: dict[str, list[tuple[int, int, int]]] = {}
    for place, (tensor, shape) in enumerate(shapes.items()):
        elements = math.prod(shape)
        if equal[:, place].all():
            dealt[tensor] = equal_part(elements, world)
            continue
        some = np.flatnonzero(equal[: -(-elements // equal_part(elements, world)), place])
        listed[tensor] = [(*_equal(elements, int(rank), world)[0], int(rank)) for rank in some]
    for rank, report in enumerate(reports):
        for tensor, parts in report["other"].items():
            if tensor in listed:
                listed[tensor] += [(start, length, rank) for start, length in parts]
    return dealt, {tensor: sorted(parts) for tensor, parts in listed.items()}


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
