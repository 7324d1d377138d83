"""Compile every kernel for every architecture without a GPU, and report its registers, shared memory and spills.

    python -m iwm_fast.kernels.aot [--json FILE] [--markdown FILE] [--keep DIR] [--arch sm_90 ...] [--bounds]

The launchers run on meta tensors while their launches are recorded, so the compiled code is what they launch: the same
dtypes, strides and block sizes, with every candidate of each architecture. Exit code 1 if a kernel spills registers or
needs more shared memory than the chip has per program. ``--bounds`` also reads the machine code, and prints each
kernel's upper bounds of speed (`bounds.py`) and GELU's instructions per element; --json then has these as rows, and the
resources as "kernels".
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
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._aot.bounds import Bound, bounds_of
from ._aot.launches import Launch, record_launches, signature
from ._aot.probes import gelu_and_slope_probe, gelu_probe
from ._aot.report import Report, bound_line, page, report_line
from ._aot.sass import disassemble
from ._lib.jit import INTERPRETED
from ._tuning.candidates import ARCHITECTURES, SHARED_LIMIT

__all__ = ["Report", "compile_launch", "gelu_counts", "main"]

SCHEMA = "iwm-fast-aot/1"
# Registers and threads per multiprocessor (CUDA programming guide, technical specifications), the same on all three.
_REGISTERS, _THREADS = 65536, 2048
# Threads of the probe kernels, and elements per thread.
_PROBE_THREADS, _PROBE_ELEMENTS = 128, 8
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


class _Count(NamedTuple):
    total: int
    registers: int
    spill_bytes: int


def compile_launch(launch: Launch, arch: str, keep: Path | None = None, *, bounds: bool = False) -> Report:
    """Compile for `arch` ("sm_90") and return the assembler's report; `keep`: a folder for the cubin.

    bounds: also read the machine code.
    """
    types, constants, attributes = signature(launch, arch)
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
    found: list[Bound] = []
    if bounds:
        code = disassemble(made.asm["cubin"])
        found = bounds_of(launch, arch, code, registers=registers, spill_bytes=spilled, programs=programs)
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
        bounds=tuple(found),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of local memory, per thread, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {said.stdout[:500]}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def gelu_counts(arch: str) -> list[Bound]:
    """Return instructions per element of GELU, and of GELU with its derivative, for half-precision results.

    The difference between an elementwise fp32 kernel with the activation and one without.
    """
    rows = []
    for role, probe, pointers in (("gelu", gelu_probe, 2), ("gelu_and_slope", gelu_and_slope_probe, 4)):
        totals = [_count_probe(probe, pointers, kind, arch) for kind in ("rational", "none")]
        found = (totals[0].total - totals[1].total) / _PROBE_ELEMENTS
        rows.append(
            Bound(
                kernel=probe.__name__, role=role, arch=arch, shape="per element",
                config={"BLOCK": _PROBE_THREADS * _PROBE_ELEMENTS, "num_warps": _PROBE_THREADS // 32}, wgmma={},
                loop_instructions=0, outside_instructions=totals[0].total, loop_barriers=0, barriers=0,
                registers=totals[0].registers, spill_bytes=totals[0].spill_bytes, programs=0, persistent=False,
                instructions_per_element=found,
            )
        )  # fmt: skip
    return rows


def _count_probe(probe: Any, pointers: int, kind: str, arch: str) -> _Count:
    types = dict.fromkeys(probe.arg_names[:pointers], "*fp32") | {"KIND": "constexpr", "BLOCK": "constexpr"}
    constants = {(pointers,): kind, (pointers + 1,): _PROBE_THREADS * _PROBE_ELEMENTS}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(pointers)}
    source = ASTSource(fn=probe, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    cubin = triton.compile(source, target=target, options={"num_warps": _PROBE_THREADS // 32}).asm["cubin"]
    return _Count(disassemble(cubin).total, *_resources(cubin))


def _rows(archs: list[str], keep: Path | None, *, bounds: bool) -> Iterator[Report]:
    for arch in archs:
        for launch in record_launches(arch):
            yield compile_launch(launch, arch, keep, bounds=bounds)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m iwm_fast.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the rows to this file as a page")
    parser.add_argument("--keep", type=Path, help="write the cubins to this folder")
    parser.add_argument("--bounds", action="store_true", help="read the machine code and report upper bounds of speed")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    args = parser.parse_args(words)
    if INTERPRETED.value:
        print("aot: TRITON_INTERPRET=1 is set; unset it to compile", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot print × must not lose the rows
            stream.reconfigure(errors="backslashreplace")
    for path in filter(None, (args.json, args.markdown, args.keep and args.keep / "cubins")):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            print(f"aot: {path.parent}: cannot be written: {error.strerror}; give another folder", file=sys.stderr)
            return 2
    reports = []
    for report in _rows(args.arch, args.keep, bounds=args.bounds):
        reports.append(report)
        for line in map(bound_line, report.bounds) if report.bounds else [report_line(report)]:
            print(line + (f"  <- {report.fault}" if report.fault else ""), flush=True)
    extra = [row for arch in args.arch for row in gelu_counts(arch)] if args.bounds else []
    for count in extra:
        print(bound_line(count))
    if args.json is not None:
        kernels = [asdict(report) for report in reports]
        for row in kernels:
            del row["bounds"]
        document: dict[str, Any] = {"schema": SCHEMA, "triton": triton.__version__, "rows": kernels}
        if args.bounds:
            bounds = [bound for report in reports for bound in report.bounds] + extra
            document |= {"rows": [asdict(bound) for bound in bounds], "kernels": kernels}
        _write(args.json, json.dumps(document, indent=1) + "\n")
    if args.markdown is not None:
        _write(args.markdown, page(reports))
    faults = [report for report in reports if report.fault]
    print(f"{len(reports)} kernels for {', '.join(args.arch)} with triton {triton.__version__}, {len(faults)} at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
