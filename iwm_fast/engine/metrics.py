"""metrics.jsonl and what else takes records: one a logged step, written by the first rank."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iwm_fast.engine.sinks import Sink

__all__ = ["MetricsLog", "memory_bytes"]


class MetricsLog:
    """Appends records to ``metrics.jsonl`` (flushed line by line) and hands them to the sinks."""

    def __init__(self, file: Path, sinks: Sequence[Sink] = ()) -> None:
        self._file = file.open("a")
        self._sinks = sinks

    def close(self) -> None:
        """Close all."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line; a number that is not finite is written as null, because JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(record)


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the GPU, or the process's largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
