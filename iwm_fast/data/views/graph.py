"""Run the DALI definition of the views batch by batch, and survive what DALI cannot decode.

DALI has no notion of a bad sample: one file that it rejects fails the batch and invalidates the pipeline, and the error
does not say which. So each file of a failed batch is tried alone, Pillow decodes those that DALI rejects (Pillow's
verdict counts), and the batch, with all that were queued behind it, runs again in a fresh pipeline (15 ms). That is the
second line: `encoded.inspect` finds most bad files, and must find those that could crash DALI (`structure` says why),
so a graph may only get what `inspect` or `reencode` returned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iwm_fast.actions.transforms import CORRUPTIONS, Views
from iwm_fast.data.decode.encoded import BadSample, Encoded, reencode
from iwm_fast.data.views.cpu_views import CpuViews, Rendering
from iwm_fast.data.views.gpu_decoder import DecoderPath, gpu_decoder
from iwm_fast.data.views.view_inputs import DECODED, view_inputs
from iwm_fast.errors import UserError

__all__ = ["BadRows", "RenderedViews", "ViewGraph"]

# DALI's errors (a decoder's failure is a RuntimeError); others are faults of this program.
_DALI_ERRORS = (RuntimeError, ValueError, IndexError)
_ALL = tuple(corruption.name for corruption in CORRUPTIONS)


class BadRows(BadSample):
    """Rows of a batch that neither DALI nor Pillow decodes; `reasons`: one line per row."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(f"row {row}: {reason}" for row, reason in reasons.items()))
        self.reasons = reasons


@dataclass(frozen=True, eq=False)
class RenderedViews:
    """uint8 on the graph's device: source (B · K, S, S, 3), an image's K adjacent; target (B, S, S, 3).

    base: (B, S, S, 3), I', the input of the target's jitter; source_base: the sources' own (B · K, S, S, 3), or the
    same tensor as base without the geometric group; of a graph without bases both are (0, S, S, 3). lossless: images
    that DALI rejected and Pillow decoded.

    On a GPU they are finished for the stream that was current where they were collected; another stream must
    `record_stream` them.
    """

    source: Tensor
    target: Tensor
    base: Tensor
    source_base: Tensor
    lossless: tuple[int, ...] = ()


@dataclass
class _Pending:
    encoded: list[Encoded]
    views: Views
    lossless: tuple[int, ...] = ()
    error: str | None = None
    inputs: dict[str, Any] | None = None  # on the CPU, what remains to be done after decoding
    rendering: Rendering | None = None


class ViewGraph:
    """Renders batches of at most `batch` samples as `size` × `size` views.

    device: "cpu" or "gpu" (the GPU `device_id`, default torch's current one); threads: DALI's, on the CPU. geometric:
    the sources have geometries of their own. sources: K of an image; views then have B · K rows, an image's side by
    side. corruptions: names of what may be done to sources; of a GPU's graph each takes time even if nothing has it.
    dali_only: every operator is DALI's own on the CPU too, where `cpu_views` is faster: the graph that a GPU runs.
    bases: whether what the jitters are applied to is handed out too. hw_decoder_load: data.hw_decoder_load, for a GPU.
    `submit` starts the work, at most waiting on a CPU until the batch before is decoded; `collect` waits for the oldest
    batch submitted. Not to be used from two threads at a time.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        device: str,
        threads: int,
        *,
        geometric: bool,
        sources: int = 1,
        corruptions: Iterable[str] = _ALL,
        max_pixels: int = 2**31 - 1,
        dali_only: bool = False,
        bases: bool = True,
        hw_decoder_load: float = 0.65,
        device_id: int | None = None,
    ) -> None:
        if device not in ("cpu", "gpu"):
            raise ValueError(f"device is {device!r}; it must be 'cpu' or 'gpu'")
        self.size, self.batch, self.device, self.threads = size, batch, device, threads
        self.geometric, self.sources, self.max_pixels, self.bases = geometric, sources, max_pixels, bases
        self.corruptions = frozenset(corruptions)
        self.hw_decoder_load = hw_decoder_load
        self.device_id = torch.cuda.current_device() if device == "gpu" and device_id is None else device_id
        self._path: DecoderPath = gpu_decoder(self.device_id).path if self.device_id is not None else "image_slice"
        self._pending: deque[_Pending] = deque()
        self._stream = torch.cuda.Stream(self.device_id) if device == "gpu" else None
        self.dali_only = dali_only or device == "gpu"
        self._cpu = (
            None if self.dali_only else CpuViews(size, threads, geometric=geometric, sources=sources, bases=bases)
        )
        self._pipeline = self._build()

    def __len__(self) -> int:
        return len(self._pending)

    def run(self, encoded: Sequence[Encoded], views: Views) -> RenderedViews:
        """Render one batch at once; BadRows where a row cannot be decoded (the batch is then dropped)."""
        self.submit(encoded, views)
        try:
            return self.collect()
        except BadRows:
            self.drop()
            raise

    def submit(self, encoded: Sequence[Encoded], views: Views) -> None:
        """Queue a batch; ValueError where it is empty, too large, or the counts differ."""
        if not 0 < len(encoded) <= self.batch or len(encoded) * self.sources != len(views):
            raise ValueError(
                f"{len(encoded)} files and {len(views)} views; there must be 1 to {self.batch} files and "
                f"{self.sources} view(s) of each"
            )
        if not self.geometric and not views.shared_geometry:
            raise ValueError("views with a geometry of the source's own need a ViewGraph with geometric=True")
        for corruption in CORRUPTIONS:
            if corruption.name not in self.corruptions and corruption.done(getattr(views, corruption.column)).any():
                raise ValueError(f"views with {corruption.name} need a ViewGraph that has it among its corruptions")
        self._pending.append(_Pending(list(encoded), views))
        self._schedule(self._pending[-1])
        self._render_decoded()

    def collect(self) -> RenderedViews:
        """Return the oldest batch. Raises BadRows where a row cannot be decoded: then `replace` or `drop` that
        batch.
        """
        head = self._pending[0]
        try:
            made = self._made(head)
        except _DALI_ERRORS as error:
            self._repair(head, error)
            made = self._made(head)
        self._pending.popleft()
        return made

    def replace(self, encoded: Sequence[Encoded], views: Views) -> None:
        """Replace the oldest batch."""
        self._pending[0] = _Pending(list(encoded), views)
        self._restart()

    def drop(self) -> None:
        """Drop the oldest batch."""
        self._pending.popleft()
        self._restart()

    def close(self) -> None:
        """End the threads; batches that were not collected are lost.

        The pipeline goes here and now: left to the garbage collector it may go in its own thread, which it then waits
        for.
        """
        self._pending.clear()
        self._pipeline = None
        if self._cpu is not None:
            self._cpu.close()

    def nothing(self) -> Tensor:
        """Return the images of an empty batch: uint8 (0, S, S, 3) on the graph's device."""
        device = "cpu" if self.device == "cpu" else f"cuda:{self.device_id}"
        return torch.empty((0, self.size, self.size, 3), dtype=torch.uint8, device=device)

    def _build(self) -> Any:
        pipeline = _dali_pipeline()
        if self._cpu is not None:
            return pipeline.build_decoder(self.device, device_id=None, batch=self.batch, threads=self.threads)
        return pipeline.build_views(
            self.size,
            self.batch,
            self.device,
            self.threads,
            geometric=self.geometric,
            sources=self.sources,
            corruptions=self.corruptions,
            hw_decoder_load=self.hw_decoder_load,
            device_id=self.device_id,
            path=self._path,
        )

    def _inputs(self, batch: _Pending) -> dict[str, Any]:
        return view_inputs(
            batch.encoded,
            batch.views,
            geometric=self.geometric,
            sources=self.sources,
            corruptions=self.corruptions,
            dali_only=self.dali_only,
        )

    def _schedule(self, batch: _Pending) -> None:
        """Feed and start a batch; DALI's error is kept for the batch's turn."""
        try:
            inputs = self._inputs(batch)
            for name in inputs if self._cpu is None else DECODED:
                self._pipeline.feed_input(name, inputs[name])
            batch.inputs = None if self._cpu is None else inputs
            self._pipeline.schedule_run()
        except _DALI_ERRORS as error:
            batch.error = str(error)

    def _render_decoded(self) -> None:
        """On the CPU: start on the batches that are decoded, all but the newest, which DALI is working on."""
        if self._cpu is None:
            return
        for batch in list(self._pending)[:-1]:
            if batch.error is not None:
                return  # and the pipeline is no more
            try:
                self._render(batch)
            except _DALI_ERRORS as error:
                batch.error = str(error)

    def _render(self, batch: _Pending) -> Rendering:
        """On the CPU: the batch at work, once it is decoded. Waits for DALI."""
        assert self._cpu is not None
        if batch.rendering is None:
            (decoded,) = self._pipeline.share_outputs()
            regions = [torch.from_dlpack(decoded[row]) for row in range(len(batch.encoded))]
            self._pipeline.release_outputs()  # the dynamic executor gives the memory away
            assert batch.inputs is not None
            batch.rendering = self._cpu.start(regions, batch.inputs)
        return batch.rendering

    def _restart(self) -> None:
        """Make a fresh pipeline, and restart every queued batch that is not decoded."""
        self._pipeline = self._build()
        for batch in self._pending:
            batch.error = None
            if batch.rendering is None:
                self._schedule(batch)

    def _made(self, head: _Pending) -> RenderedViews:
        if head.error is not None:
            raise RuntimeError(head.error)
        if self._cpu is not None:
            done = self._render(head)
            done.wait()
            return RenderedViews(done.source, done.target, done.base, done.source_base, head.lossless)
        target, base, *rest = self._pipeline.share_outputs()
        groups = [[target], rest[: self.sources]]
        if self.bases:
            groups += [[base], *([rest[self.sources :]] if self.geometric else [])]
        tensors = [_joined(group) for group in groups] if self._stream is None else _copied(groups, self._stream)
        self._pipeline.release_outputs()
        views, bases = tensors[:2], tensors[2:] or [self.nothing()]
        return RenderedViews(views[1], views[0], bases[0], bases[-1], head.lossless)

    def _repair(self, head: _Pending, error: Exception) -> None:
        """Make the oldest batch decodable and restart all, or raise BadRows, or DALI's other errors."""
        refused = self._refused(head)
        if not refused:
            raise error
        reasons = {}
        for row in refused:
            old = head.encoded[row]
            try:
                head.encoded[row] = self._reencode(old)
            except BadSample as bad:
                reasons[row] = bad.reason
        if reasons:
            raise BadRows(reasons) from error
        head.lossless = tuple(sorted({*head.lossless, *refused}))
        self._restart()

    def _reencode(self, old: Encoded) -> Encoded:
        new = reencode(old.data.tobytes(), self.max_pixels)
        if (new.width, new.height) != (old.width, old.height):
            raise BadSample(f"its header says {old.width} x {old.height} pixels, its data {new.width} x {new.height}")
        return new

    def _refused(self, head: _Pending) -> list[int]:
        """Rows that fail in DALI alone. A failed pipeline is not used again."""
        inputs = self._inputs(head)
        refused, probe = [], None
        for row, one in enumerate(head.encoded):
            if one.lossless:
                continue
            probe = probe or _dali_pipeline().build_decoder(self.device, device_id=self.device_id, path=self._path)
            try:
                for name in DECODED:
                    probe.feed_input(name, inputs[name][row : row + 1])
                probe.run()
            except _DALI_ERRORS:
                refused.append(row)
                probe = None
        return refused


def _dali_pipeline() -> ModuleType:
    """The definitions that DALI runs, imported only where images are read."""
    try:
        return import_module("iwm_fast.data.views.pipeline")
    except ImportError as error:
        raise UserError(
            f"images are decoded by NVIDIA DALI, which does not import here ({error}): install nvidia-dali-cuda130; "
            "iwm-fast doctor says more"
        ) from error


def _joined(outputs: Sequence[Any], *, copy: bool = False) -> Tensor:
    """K of DALI's outputs (B, ...) as one tensor (B · K, ...), those of an image side by side.

    One output alone is DALI's memory itself, which the dynamic executor gives away on the CPU, unless a copy is wanted.
    """
    shared = [torch.from_dlpack(output.as_tensor()) for output in outputs]
    if len(shared) > 1 or copy:
        return torch.stack(shared, dim=1).flatten(0, 1)
    return shared[0]


def _copied(groups: Sequence[Sequence[Any]], stream: torch.cuda.Stream) -> list[Tensor]:
    """The groups' tensors in torch's own memory: DALI may use its again as soon as the last reference goes.

    One stream reads DALI's memory and writes the copies, and is waited for: what is freed here is read by no other.
    """
    with torch.cuda.stream(stream):
        tensors = [_joined(group, copy=True) for group in groups]
    stream.synchronize()
    for tensor in tensors:
        tensor.record_stream(torch.cuda.current_stream(stream.device))
    return tensors
