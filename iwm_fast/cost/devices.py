"""GPUs by their data sheets, and the share of the peak that a step reaches.

No figure of a data sheet was measured here; each cites its page. The share is measured where a result of that GPU
exists, else assumed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.errors import UserError

__all__ = ["ASSUMED_MFU", "DEVICES", "Device", "Rate", "compute_rate", "find_device", "packaged_results", "peak_of"]


@dataclass(frozen=True)
class Device:
    """One GPU by its data sheet.

    flops: dense bf16 matmul rate, FLOP/s (half of the figure with sparsity). flops_fp32: of fp32, which does not use
    the tensor cores while torch.set_float32_matmul_precision is highest. memory: bytes. bandwidth: of the memory,
    bytes/s. link: to the other GPUs of its host, bytes/s in one direction (NVLink, or PCIe without it). network: its
    share of the host's network, bytes/s in one direction, in the vendor's own eight-GPU system. in_torch: part of the
    name that torch shows.
    """

    name: str
    in_torch: str
    flops: float
    flops_fp32: float
    memory: int
    bandwidth: float
    link_name: str
    link: float
    network: float
    source: str

    def rate(self, precision: str) -> float:
        """Return the FLOP/s of matmuls in train.precision, "bf16" or "fp32"."""
        return self.flops_fp32 if precision == "fp32" else self.flops


_GB = 10**9
_SHEETS = "nvidia.com/en-us/data-center/"
_A100 = _SHEETS + "a100 (SXM, "

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # 8 × 400 Gb/s InfiniBand per host (DGX B200, DGX H200, DGX H100 data sheets), 8 × 200 Gb/s (DGX A100).
        Device("b200", "B200", 2250e12, 75e12, 180 * _GB, 8.0e12, "NVLink", 900e9, 50e9, _SHEETS + "dgx-b200"),
        Device("h200", "H200", 989e12, 67e12, 141 * _GB, 4.8e12, "NVLink", 450e9, 50e9, _SHEETS + "h200"),
        Device("h100", "H100", 989e12, 67e12, 80 * _GB, 3.35e12, "NVLink", 450e9, 50e9, _SHEETS + "h100 (SXM)"),
        Device("a100", "A100", 312e12, 19.5e12, 80 * _GB, 2.039e12, "NVLink", 300e9, 25e9, _A100 + "80 GB)"),
        Device("a100-40gb", "A100", 312e12, 19.5e12, 40 * _GB, 1.555e12, "NVLink", 300e9, 25e9, _A100 + "40 GB)"),
        Device("l40s", "L40S", 362e12, 91.6e12, 48 * _GB, 0.864e12, "PCIe", 32e9, 12.5e9, _SHEETS + "l40s"),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """Return the device of that name, in any case. Raises UserError with the known names."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"--gpu {name}: not known here; choose one of {', '.join(DEVICES)}")
    return device


def peak_of(torch_name: str) -> float | None:
    """Return the peak FLOP/s of the GPU that torch shows under this name; None for an unlisted one."""
    return next((device.flops for device in DEVICES.values() if device.in_torch in torch_name), None)


ASSUMED_MFU = 0.40  # not measured: what well-tuned ViT training is said to reach, until there is a result


@dataclass(frozen=True)
class Rate:
    """mfu: useful FLOPs over the data sheet's; origin: "measured", "given" or "assumed"; source: its file or reason."""

    mfu: float
    origin: str
    source: str


def packaged_results() -> Path:
    """Return the checkout's benchmarks/results; it may not exist, since results are not installed."""
    return Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def compute_rate(device: Device, operations: float, results: Path, mfu: float | None, precision: str = "bf16") -> Rate:
    """Return the rate to plan with: `mfu` where given, else the newest result of this GPU, else the assumption.

    A result is what `iwm-fast bench step --json` writes: `schema` iwm-fast-bench-step/…, that GPU in `gpus` of its
    `environment`, and `rows` with `name`, `mfu` and `operations_per_image`; of several rows the one nearest to
    `operations` per image. Results are shares of the bf16 rate, so fp32 uses the assumption. Raises UserError where a
    file there cannot be read.
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
        raise UserError(f"{path}: not JSON ({error}); fix or remove it, or name another --results") from error
    if not str(document.get("schema", "")).startswith("iwm-fast-bench-step/"):
        return None
    gpus = document.get("environment", {}).get("gpus") or []
    if not any(device.in_torch in gpu.get("name", "") for gpu in gpus):
        return None
    rows: list[dict[str, Any]] = [row for row in document.get("rows", []) if row.get("mfu")]
    return min(rows, key=lambda row: abs(math.log(row["operations_per_image"] / operations)), default=None)
