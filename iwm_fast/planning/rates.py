"""The share of a GPU's data-sheet rate that a step reaches: measured where a result of that GPU lies, else assumed."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.config import Config
from iwm_fast.errors import UserError
from iwm_fast.planning.devices import Device

__all__ = ["ASSUMED_MFU", "Rate", "compute_rate", "packaged_results"]

ASSUMED_MFU = 0.40  # nobody measured it: what well-tuned ViT training is said to reach, to be replaced by a result


@dataclass(frozen=True)
class Rate:
    """mfu: useful operations over the data sheet's; origin: "measured", "given" or "assumed"; source: where from."""

    mfu: float
    origin: str
    source: str


def packaged_results() -> Path:
    """The checkout's benchmarks/results; it may not be there, since results are not installed."""
    return Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def compute_rate(device: Device, config: Config, results: Path, mfu: float | None) -> Rate:
    """The rate to plan with: `mfu` where it is given, else the newest result of this GPU, else the assumption.

    A result is a JSON document of benchmarks/results with `schema` iwm-fast-bench-step/…, that GPU in
    `environment.gpus` and `rows` with an `mfu` each; of several rows those with this configuration's encoder, and of
    these the median.
    UserError where a file there cannot be read.
    """
    if mfu is not None:
        return Rate(mfu, "given", "--mfu")
    found = [(path, measured) for path in _newest_first(results) if (measured := _measured(path, device, config))]
    if found:
        path, value = found[0]
        return Rate(value, "measured", path.name)
    return Rate(ASSUMED_MFU, "assumed", f"no measured step of a {device.in_torch} in {results.name}/")


def _newest_first(results: Path) -> list[Path]:
    files = results.glob("*.json") if results.is_dir() else ()
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def _measured(path: Path, device: Device, config: Config) -> float | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend or remove it, or name another --results") from error
    if not str(document.get("schema", "")).startswith("iwm-fast-bench-step/"):
        return None
    gpus = document.get("environment", {}).get("gpus") or []
    if not any(device.in_torch in gpu.get("name", "") for gpu in gpus):
        return None
    rows: list[dict[str, Any]] = [row for row in document.get("rows", []) if isinstance(row.get("mfu"), float)]
    same = [row for row in rows if row.get("encoder") == config.model.encoder]
    return statistics.median(row["mfu"] for row in same or rows) if rows else None
