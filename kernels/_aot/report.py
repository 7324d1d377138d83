"""Resources of a compiled kernel and upper bounds of its speed: as values, as lines, as a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from iwm_fast.kernels._tuning.candidates import SHARED_LIMIT

from .bounds import Bound

__all__ = ["Report", "bound_line", "page", "report_line"]

_MULTIPLIES = ("hidden_backward_kernel", "linear_kernel", "weight_grad_kernel")
_BLOCKS = ("BLOCK_N", "BLOCK_M", "BLOCK_K")


@dataclass(frozen=True)
class Report:
    """Resources of a compiled kernel. spill_bytes: local memory per thread. programs: per multiprocessor."""

    kernel: str
    arch: str
    shape: str
    config: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    matrix_instructions: dict[str, int]
    bounds: tuple[Bound, ...] = ()

    @property
    def fault(self) -> str | None:
        """Return why the kernel may not ship, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes per thread"
        if self.kernel in _MULTIPLIES and not self.matrix_instructions:
            return "has no matrix instruction"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"needs {self.shared_bytes} bytes of shared memory; {self.arch} has {SHARED_LIMIT[self.arch]}"
        return None


def bound_line(bound: Bound) -> str:
    """Return a kernel's bounds, and what they are computed from, as one line."""
    c = bound.config
    blocks = "x".join(str(v) for k, v in c.items() if k in _BLOCKS)
    text = (
        f"{bound.arch:7}{bound.role:19}{bound.shape:13}{blocks:12}{'tma' if c.get('TMA') else '-':4}"
        f"loop {bound.loop_instructions:4} outside {bound.outside_instructions:5} barriers {bound.loop_barriers:2} "
        f"regs {bound.registers:3} programs {bound.programs}"
    )
    if bound.instructions_per_element is not None:
        return f"{bound.arch:7}{bound.role:19}{bound.shape:13}{bound.instructions_per_element:.1f} instructions"
    if bound.serial is None:
        return text
    overlapped = "-" if bound.overlapped is None else f"{bound.overlapped:.0%}"
    text += (
        f"  T {bound.tensor_cycles:.0f} I {bound.loop_cycles:.0f} E {bound.outside_cycles:.0f}"
        f"  serial {bound.serial:.0%} overlapped {overlapped}  last wave {bound.last_wave:.0%}"
    )
    if bound.l2_bytes_per_token is not None and bound.by_l2 is not None:
        shares = ", ".join(f"{share:.0%}" for share in bound.by_l2)
        text += f"  L2 {bound.l2_bytes_per_token / 1e3:.1f} KB/token ({shares})"
    if bound.partial_bytes_per_token is not None:
        text += f"  partial sums {bound.partial_bytes_per_token / 1e3:.1f} KB/token"
    return text


def report_line(report: Report) -> str:
    """Return a kernel's resources as one line."""
    config = report.config
    blocks = "x".join(str(v) for k, v in config.items() if k.startswith("BLOCK_"))
    tail = f"parts {config['PARTS']}" if "PARTS" in config else f"stages {config.get('num_stages', '-')}"
    matrix = ", ".join(f"{n} {kind}" for kind, n in report.matrix_instructions.items()) or "-"
    return (
        f"{report.arch:7}{report.kernel:24}{report.shape:15}{blocks:13}warps {config['num_warps']:<3}{tail:10}"
        f"{report.registers:5} regs{report.spill_bytes:6} spilled{report.shared_bytes:8} shared"
        f"{report.programs:4} programs  {matrix}"
    )


_COLUMNS = (
    "kernel", "architecture", "of", "blocks", "warps", "stages", "registers", "spilled bytes", "shared bytes",
    "programs", "matrix instructions",
)  # fmt: skip


def page(reports: list[Report]) -> str:
    """Return the rows as a Markdown page."""
    bounds = [row for report in reports for row in report.bounds if row.limit is not None]
    words = f"--arch {' '.join(sorted({r.arch for r in reports}))}{' --bounds' if bounds else ''}"
    command = f"python -m iwm_fast.kernels.aot {words} --markdown FILE"
    lines = [
        "# Resources of the kernels",
        "",
        f"Compiled ahead of time with Triton {triton.__version__}, no GPU, by",
        f"`{command}`.",
        "",
        *(_bounds_section(bounds) if bounds else []),
        "## Registers, shared memory, instructions",
        "",
        "Programs: how many fit on an SM at once, estimated from registers, threads and shared memory.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for r in reports:
        blocks = " × ".join(str(v) for k, v in r.config.items() if k.startswith("BLOCK_"))
        blocks += f" × {r.config['PARTS']} pieces" if "PARTS" in r.config else ""
        matrix = ", ".join(f"{n} {kind}" for kind, n in r.matrix_instructions.items())
        lines.append(
            f"| {r.kernel} | {r.arch} | {r.shape} | {blocks} | {r.config['num_warps']} "
            f"| {r.config.get('num_stages', '')} | {r.registers} | {r.spill_bytes} | {r.shared_bytes} | {r.programs} "
            f"| {matrix} |"
        )
    return "\n".join(lines) + "\n"


_BOUND_COLUMNS = (
    "role", "of", "blocks", "by descriptors", "T", "I", "E", "serial", "overlapped", "KB per token from L2",
    "by L2 at 5.5 and 7 TB/s", "last wave",
)  # fmt: skip


def _bounds_section(bounds: list[Bound]) -> list[str]:
    """Return the upper bounds of the matmuls' speed as a table."""
    lines = [
        "## Upper bounds of speed",
        "",
        "Counted in the machine code, not measured. Cycles per tile on one SM: T of the tensor cores, I of the main",
        "loop's instructions, E of the others. Shares of the tensor cores' peak: serial, T / (max(T, I) + E);",
        "overlapped, T / max(T, I + E), if the epilogue of one tile can run beside the loop of another. L2",
        "bandwidth has not been measured: both rates are assumed.",
        "",
        "| " + " | ".join(_BOUND_COLUMNS) + " |",
        "|---" * len(_BOUND_COLUMNS) + "|",
    ]
    for b in bounds:
        blocks = " × ".join(str(v) for k, v in b.config.items() if k in _BLOCKS)
        overlapped = "–" if b.overlapped is None else f"{b.overlapped:.0%}"
        by_l2 = ", ".join(f"{share:.0%}" for share in b.by_l2 or ())
        lines.append(
            f"| {b.role} | {b.shape} | {blocks} | {'yes' if b.config['TMA'] else ''} | {b.tensor_cycles:.0f} "
            f"| {b.loop_cycles:.0f} | {b.outside_cycles:.0f} | {b.serial:.0%} | {overlapped} "
            f"| {(b.l2_bytes_per_token or 0) / 1e3:.1f} | {by_l2} | {b.last_wave:.0%} |"
        )
    return [*lines, ""]
