"""The share of a GPU's data-sheet rate that a step reaches: measured where a result of that GPU lies, else assumed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.cost.devices import Device
from iwm_fast.errors import UserError

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


def compute_rate(device: Device, operations: float, results: Path, mfu: float | None, precision: str = "bf16") -> Rate:
    """The rate to plan with: `mfu` where it is given, else the newest result of this GPU, else the assumption.

    A result is what `iwm-fast bench step --json` writes: `schema` iwm-fast-bench-step/…, that GPU in
    `environment.gpus`, and `rows` with `name`, `mfu` and `operations_per_image`; of several rows the one nearest to
    `operations` an image. Results are shares of the bf16 rate, so that fp32 has the assumption. UserError where a file
    there cannot be read.
    """
    if mfu is not None:
        return Rate(mfu, "given", "--mfu")
    if precision != "bf16":
        return Rate(ASSUMED_MFU, "assumed", f"no measured step in {precision}")
    for path in _newest_first(results):
        row = _measured(path, device, operations)
        if row is not None:
            return Rate(row["mfu"], "measured", f"{path.name}, {row.get('name')}")
    return Rate(ASSUMED_MFU, "assumed", f"no measured step of a {device.in_torch} in {results.name}/")


def _newest_first(results: Path) -> list[Path]:
    files = results.glob("*.json") if results.is_dir() else ()
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def _measured(path: Path, device: Device, operations: float) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend or remove it, or name another --results") from error
    if not str(document.get("schema", "")).startswith("iwm-fast-bench-step/"):
        return None
    gpus = document.get("environment", {}).get("gpus") or []
    if not any(device.in_torch in gpu.get("name", "") for gpu in gpus):
        return None
    rows: list[dict[str, Any]] = [row for row in document.get("rows", []) if row.get("mfu")]
    return min(rows, key=lambda row: abs(math.log(row["operations_per_image"] / operations)), default=None)
