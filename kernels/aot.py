"""Compile every kernel for every architecture without a GPU, and say what each takes of the chip.

    python -m iwm_fast.kernels.aot [--json FILE] [--markdown FILE] [--keep DIR] [--arch sm_90 ...] [--bounds]

The launchers run on tensors without memory while their launches are recorded, so what is compiled here is what they
launch: the same types, strides and block sizes, each candidate of an architecture for that architecture. Exit code 1
where a kernel spills registers or wants more shared memory than the chip gives a program. ``--bounds`` reads the
machine code too, and says how fast each kernel with a loop can be at most (`_bounds`); the rows of --json are these then.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._bounds import Bound, bound_of
from ._candidates import ARCHITECTURES, SHARED_LIMIT
from ._jit import INTERPRETED
from ._launches import Launch, record_launches, signature
from ._sass import disassemble

__all__ = ["Report", "compile_launch", "main"]

SCHEMA = "iwm-fast-aot/1"
# Registers and threads of a multiprocessor (CUDA programming guide, technical specifications), all three alike.
_REGISTERS, _THREADS = 65536, 2048
_MULTIPLIES = ("hidden_backward_kernel", "linear_kernel", "weight_grad_kernel")
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes. spill_bytes: of local memory a thread. programs: that fit on a multiprocessor."""

    kernel: str
    arch: str
    shape: str
    config: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    matrix_instructions: dict[str, int]
    bound: Bound | None = None

    @property
    def fault(self) -> str | None:
        """Why this may not ship, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        if self.kernel in _MULTIPLIES and not self.matrix_instructions:
            return "has no matrix instruction"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"wants {self.shared_bytes} bytes of shared memory; {self.arch} has {SHARED_LIMIT[self.arch]}"
        return None


def compile_launch(launch: Launch, arch: str, keep: Path | None = None, *, bounds: bool = False) -> Report:
    """Compile for `arch` ("sm_90") and read what the assembler says; `keep`: a folder for the cubin.

    bounds: read the machine code too.
    """
    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    made = triton.compile(source, target=target, options=launch.options)
    name = launch.kernel.__name__
    blocks = {key: value for key, value in launch.arguments.items() if key.startswith("BLOCK_") or key == "PARTS"}
    config = blocks | launch.options
    registers, spilled = _resources(made.asm["cubin"])
    if keep is not None:
        label = hashlib.sha256(f"{launch.shape}{types}{constants}{config}".encode()).hexdigest()[:8]
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.{arch}.{label}.cubin").write_bytes(made.asm["cubin"])
    threads = 32 * made.metadata.num_warps
    shared = int(made.metadata.shared)
    fitting = [_REGISTERS // (registers * threads), _THREADS // threads]
    fitting += [SHARED_LIMIT[arch] // shared] if shared else []
    programs = min(fitting)
    instructions = [found.group(1) for found in _MATRIX.finditer(made.asm["ptx"])]
    bound = None
    if bounds:
        code = disassemble(made.asm["cubin"])
        bound = bound_of(launch, arch, code, registers=registers, spill_bytes=spilled, programs=programs)
    return Report(
        kernel=name,
        arch=arch,
        shape=launch.shape,
        config=config,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        programs=programs,
        matrix_instructions={kind: instructions.count(kind) for kind in sorted(set(instructions))},
        bound=bound,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, a thread: cuobjdump's reading of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump did not say what the kernel takes: {said.stdout[:500]}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def _rows(archs: list[str], keep: Path | None, *, bounds: bool) -> Iterator[Report]:
    for arch in archs:
        for launch in record_launches(arch):
            yield compile_launch(launch, arch, keep, bounds=bounds)


def _bound_line(bound: Bound) -> str:
    """The bounds of a kernel with what they come from."""
    c = bound.config
    blocks = "x".join(str(v) for k, v in c.items() if k in ("BLOCK_N", "BLOCK_M", "BLOCK_K"))
    text = (
        f"{bound.arch:7}{bound.role:16}{bound.shape:13}{blocks:12}{'tma' if c.get('TMA') else '-':4}"
        f"loop {bound.loop_instructions:4} outside {bound.outside_instructions:5} barriers {bound.loop_barriers:2} "
        f"regs {bound.registers:3} programs {bound.programs}"
    )
    if bound.serial is None:
        return text
    overlapped = "-" if bound.overlapped is None else f"{bound.overlapped:.0%}"
    text += (
        f"  T {bound.tensor_cycles:.0f} I {bound.loop_cycles:.0f} E {bound.outside_cycles:.0f}  serial {bound.serial:.0%} "
        f"overlapped {overlapped}  last wave {bound.last_wave:.0%}"
    )
    if bound.l2_bytes_per_token is not None and bound.by_l2 is not None:
        shares = ", ".join(f"{share:.0%}" for share in bound.by_l2)
        text += f"  L2 {bound.l2_bytes_per_token / 1e3:.1f} KB a token ({shares})"
    if bound.partial_bytes_per_token is not None:
        text += f"  partial sums {bound.partial_bytes_per_token / 1e3:.1f} KB a token"
    return text


def _line(report: Report) -> str:
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


def _markdown(reports: list[Report]) -> str:
    """The rows as a page."""
    command = f"python -m iwm_fast.kernels.aot --arch {' '.join(sorted({r.arch for r in reports}))} --markdown FILE"
    lines = [
        "# What the kernels take of the chip",
        "",
        f"Compiled ahead of time with Triton {triton.__version__}, no GPU, by `{command}`. Programs: that fit on a",
        "multiprocessor at once, an estimate from registers, threads and shared memory.",
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


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m iwm_fast.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write them as a page here")
    parser.add_argument("--keep", type=Path, help="write the cubins into this folder")
    parser.add_argument("--bounds", action="store_true", help="read the machine code, and say how fast it can be")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    args = parser.parse_args(words)
    if INTERPRETED.value:
        print("aot: TRITON_INTERPRET=1 is set; compiling needs a process without it", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without × is no reason to lose the rows
            stream.reconfigure(errors="backslashreplace")
    for path in filter(None, (args.json, args.markdown, args.keep and args.keep / "cubins")):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            print(f"aot: {path.parent}: cannot be written: {error.strerror}; name another folder", file=sys.stderr)
            return 2
    reports = []
    for report in _rows(args.arch, args.keep, bounds=args.bounds):
        reports.append(report)
        line = _bound_line(report.bound) if report.bound is not None else _line(report)
        print(line + (f"  <- {report.fault}" if report.fault else ""), flush=True)
    if args.json is not None:
        found = [r.bound for r in reports if r.bound is not None] if args.bounds else reports
        document = {"schema": SCHEMA, "triton": triton.__version__, "rows": [asdict(row) for row in found]}
        _write(args.json, json.dumps(document, indent=1) + "\n")
    if args.markdown is not None:
        _write(args.markdown, _markdown(reports))
    faults = [report for report in reports if report.fault]
    print(f"{len(reports)} kernels for {', '.join(args.arch)} with triton {triton.__version__}, {len(faults)} at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
