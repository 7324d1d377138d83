"""Which attention was measured as the fastest on a GPU, for batches alike: the table that ships with the package.

An entry is about a GPU by its name, a type, the heads and their size, whether all images have as many tokens, the mean
length's bucket, and whether there is a backward pass. It says nothing of batches of less than half the tokens that were
measured (a GPU that is not full ranks them otherwise), nor of another minor version of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from iwm_fast.kernels import bucket, device_name, shipped_attention
from iwm_fast.models.packing import Segments

__all__ = ["MARGIN", "attention_key", "measured_backends", "measured_choice", "table_entry", "torch_minor"]

# xformers unless another one takes less than this share of its time: below that, repeats differ as much.
MARGIN = 0.98


def attention_key(segments: Segments, heads: int, head: int, dtype: torch.dtype, *, gradients: bool) -> str:
    """What an entry is found by, within those of a GPU."""
    mean = -(-segments.total // max(1, segments.filled))
    lengths = "equal" if segments.equal else "ragged"
    passes = "gradients" if gradients else "forward"
    return f"{str(dtype).removeprefix('torch.')} heads={heads}x{head} length={bucket(mean)} {lengths} {passes}"


def torch_minor() -> str:
    """Of the installed torch: 2.11, say."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


def table_entry(seconds: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """An entry from medians by backend, at least one: {choice, tokens, torch, seconds}."""
    best = min(seconds, key=lambda name: seconds[name])
    usual = seconds.get("xformers")
    choice = best if usual is None or seconds[best] < MARGIN * usual else "xformers"
    return {"choice": choice, "tokens": tokens, "torch": torch_minor(), "seconds": dict(seconds)}


def measured_choice(
    device: torch.device, segments: Segments, heads: int, head: int, dtype: torch.dtype, *, gradients: bool
) -> str | None:
    """The backend that a measurement chose for such batches on this GPU; None where there is none."""
    table = _table(device)
    if not table:
        return None
    entry = table.get(attention_key(segments, heads, head, dtype, gradients=gradients))
    if entry is None or entry["torch"] != torch_minor() or 2 * segments.total < entry["tokens"]:
        return None
    return str(entry["choice"])


def measured_backends(device: torch.device) -> list[str]:
    """What the table's entries for this GPU and torch choose, each once."""
    return sorted({str(entry["choice"]) for entry in _table(device).values() if entry["torch"] == torch_minor()})


@cache
def _table(device: torch.device) -> dict[str, Any]:
    return shipped_attention(device_name(device))
