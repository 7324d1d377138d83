"""The fastest attention measured on a GPU for similar batches, from the table that ships with the package.

An entry holds for a GPU by name, a dtype, the heads and their size, equal or varying lengths, the mean length's bucket,
and with or without a backward pass. It does not hold for batches below half the measured tokens (a GPU that is not full
ranks backends otherwise), nor for another minor version of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from iwm_fast.kernels import bucket, device_name, shipped_attention
from iwm_fast.models.packing import Segments

__all__ = ["MARGIN", "attention_key", "measured_backends", "measured_choice", "table_entry", "torch_minor"]

# xformers unless another backend takes less than this share of its time: repeats differ by as much.
MARGIN = 0.98


def attention_key(segments: Segments, heads: int, head: int, dtype: torch.dtype, *, gradients: bool) -> str:
    """Return the key of an entry within those of a GPU."""
    mean = -(-segments.total // max(1, segments.filled))
    lengths = "equal" if segments.equal else "ragged"
    passes = "gradients" if gradients else "forward"
    return f"{str(dtype).removeprefix('torch.')} heads={heads}x{head} length={bucket(mean)} {lengths} {passes}"


def torch_minor() -> str:
    """Return the minor version of the installed torch, such as 2.11."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


def table_entry(seconds: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """Return an entry from medians by backend, at least one: {choice, tokens, torch, seconds}."""
    best = min(seconds, key=lambda name: seconds[name])
    usual = seconds.get("xformers")
    choice = best if usual is None or seconds[best] < MARGIN * usual else "xformers"
    return {"choice": choice, "tokens": tokens, "torch": torch_minor(), "seconds": dict(seconds)}


def measured_choice(
    device: torch.device, segments: Segments, heads: int, head: int, dtype: torch.dtype, *, gradients: bool
) -> str | None:
    """Return the measured backend for such batches on this GPU, or None."""
    table = _table(device)
    if not table:
        return None
    entry = table.get(attention_key(segments, heads, head, dtype, gradients=gradients))
    if entry is None or entry["torch"] != torch_minor() or 2 * segments.total < entry["tokens"]:
        return None
    return str(entry["choice"])


def measured_backends(device: torch.device) -> list[str]:
    """Return the backends of the table for this GPU and torch, each once."""
    return sorted({str(entry["choice"]) for entry in _table(device).values() if entry["torch"] == torch_minor()})


@cache
def _table(device: torch.device) -> dict[str, Any]:
    return shipped_attention(device_name(device))
