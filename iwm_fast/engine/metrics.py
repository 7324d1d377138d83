"""metrics.jsonl and TensorBoard: one record a logged step, written by the first rank."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch

__all__ = ["MetricsLog", "memory_bytes"]


class MetricsLog:
    """Appends records to ``metrics.jsonl`` (flushed line by line) and scalars to TensorBoard."""

    def __init__(self, file: Path, tensorboard: Path | None) -> None:
        self._file = file.open("a")
        self._board: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard))

    def close(self) -> None:
        """Close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line; a number that is not finite is written as null, because JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, record["step"])


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on the GPU, or the process's largest resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
