"""Measurements of packed attention in the form that model.attention=auto reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iwm_fast.errors import UserError, because
from iwm_fast.kernels import device_name
from iwm_fast.models.measured_attention import table_entry
from iwm_fast.results import write_json

__all__ = ["table_of", "whole_table", "write_table"]


def table_of(rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Return {GPU: {key: entry}} from rows of `benchmarks.attention`. Empty for a CPU, where nothing is chosen."""
    if device.type != "cuda":
        return {}
    seconds: dict[str, dict[str, float]] = {}
    tokens: dict[str, int] = {}
    for row in rows:
        if "backend" in row and "p50" in row:
            seconds.setdefault(row["key"], {})[row["backend"]] = row["p50"]
            tokens[row["key"]] = row["tokens"]
    return {device_name(device): {key: table_entry(each, tokens[key]) for key, each in seconds.items()}}


def whole_table(file: Path) -> dict[str, Any]:
    """Read a file of the form of kernels/tuned.json. Raise UserError if it is none."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {because(error, 'give kernels/tuned.json to --table')}") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); give kernels/tuned.json to --table") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("devices"), dict):
        raise UserError(f"{file}: not a table of measurements; give kernels/tuned.json to --table")
    return whole


def write_table(file: Path, table: dict[str, Any]) -> None:
    """Write entries, {GPU: {key: entry}}, over those with the same keys. Raise UserError if that fails."""
    whole = whole_table(file)
    known = whole.setdefault("attention", {})
    for name, entries in table.items():
        known[name] = {**known.get(name, {}), **entries}
    write_json(file, whole, indent=1)
