"""metrics.jsonl and other sinks: one record per logged step, written by the first rank."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iwm_fast.atomic_files import sync_open
from iwm_fast.engine.metrics.loggers import Sink
from iwm_fast.errors import UserError, because

__all__ = ["MetricsLog", "memory_bytes", "metrics_record"]


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and passes them to the sinks. Raises UserError where the disk is full; a
    sink that fails gets no more, which a line says.
    """

    def __init__(self, file: Path, sinks: Sequence[Sink] = ()) -> None:
        self._path = file
        self._file = file.open("ab", buffering=0)  # unbuffered: a kill leaves a line whole or not at all
        self._sinks = list(sinks)

    def close(self) -> None:
        """Close all."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def write(self, record: dict[str, Any]) -> None:
        """Write one line; a non-finite number becomes null, because JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            line = memoryview((json.dumps(clean) + "\n").encode())
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise self._unwritten(error) from error
        for sink in [*self._sinks]:
            try:
                sink.write(record)
            except OSError as error:
                self._sinks.remove(sink)
                print(f"{sink.where}: {because(error)}; it gets no more of this run", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Flush the lines to the disk; called before a checkpoint, after which they are not written again."""
        try:
            sync_open(self._file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: metrics cannot be written ({because(error)}), then --resume auto")


def metrics_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of ``metrics.jsonl``; None where a kill, a crash or an editor damaged it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int
    return record if whole else None


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory: allocated on the GPU, or the process's largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
