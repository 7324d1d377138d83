"""What the vendors say of their GPUs. Nothing here was measured; every figure carries the page it was read on."""

from __future__ import annotations

from dataclasses import dataclass

from iwm_fast.errors import UserError

__all__ = ["DEVICES", "Device", "find_device", "peak_of"]


@dataclass(frozen=True)
class Device:
    """One GPU as its data sheet has it.

    flops: dense bf16 matrix rate, operations a second (half of what is printed with sparsity). flops_fp32: of fp32,
    which does not use the matrix units while torch.set_float32_matmul_precision is highest. memory: bytes.
    bandwidth: of the memory, bytes a second. link: to the other GPUs of its host, bytes a second in one direction
    (NVLink, or PCIe where there is none). network: its share of the host's network, bytes a second in one direction,
    in the vendor's own eight-GPU system. in_torch: part of the name under which torch shows it.
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
        """Operations a second of products in train.precision, "bf16" or "fp32"."""
        return self.flops_fp32 if precision == "fp32" else self.flops


_GB = 10**9
_SHEETS = "nvidia.com/en-us/data-center/"
_A100 = _SHEETS + "a100 (SXM, "

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # 8 × 400 Gb/s InfiniBand a host (DGX B200, DGX H200, DGX H100 data sheets), 8 × 200 Gb/s (DGX A100).
        Device("b200", "B200", 2250e12, 75e12, 180 * _GB, 8.0e12, "NVLink", 900e9, 50e9, _SHEETS + "dgx-b200"),
        Device("h200", "H200", 989e12, 67e12, 141 * _GB, 4.8e12, "NVLink", 450e9, 50e9, _SHEETS + "h200"),
        Device("h100", "H100", 989e12, 67e12, 80 * _GB, 3.35e12, "NVLink", 450e9, 50e9, _SHEETS + "h100 (SXM)"),
        Device("a100", "A100", 312e12, 19.5e12, 80 * _GB, 2.039e12, "NVLink", 300e9, 25e9, _A100 + "80 GB)"),
        Device("a100-40gb", "A100", 312e12, 19.5e12, 40 * _GB, 1.555e12, "NVLink", 300e9, 25e9, _A100 + "40 GB)"),
        Device("l40s", "L40S", 362e12, 91.6e12, 48 * _GB, 0.864e12, "PCIe", 32e9, 12.5e9, _SHEETS + "l40s"),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name, in any case. UserError names those that are known."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"--gpu {name}: not known here; choose one of {', '.join(DEVICES)}")
    return device


def peak_of(torch_name: str) -> float | None:
    """Peak of the GPU that torch shows under this name, operations a second; None for one that is not listed."""
    return next((device.flops for device in DEVICES.values() if device.in_torch in torch_name), None)
