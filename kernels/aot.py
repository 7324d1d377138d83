"""Compile every kernel for every architecture without a GPU, and say what each takes of the chip.

    python -m iwm_fast.kernels.aot [--json FILE] [--markdown FILE] [--keep DIR] [--arch sm_90 ...]

The launchers run on tensors without memory while their launches are recorded, so what is compiled here is what they
launch: the same types, strides and block sizes, each candidate of an architecture for that architecture. Exit code 1
where a kernel spills registers or wants more shared memory than the chip gives a program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import _mlp_triton
from ._candidates import ARCHITECTURES, SHARED_LIMIT, candidates_of
from ._jit import INTERPRETED
from ._launch import norm_backward, normalise
from ._tuning import use_tuner
from .ema_update import launch_average
from .patchify import launch_patchify
from .predictor_input import launch_assembly, launch_assembly_backward
from .stopgrad_l2 import launch_distance

__all__ = ["Launch", "Report", "compile_launch", "main", "record_launches"]

SCHEMA = "iwm-fast-aot/1"
# Registers and threads of a multiprocessor (CUDA programming guide, technical specifications), all three alike.
_REGISTERS, _THREADS = 65536, 2048
_POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_MULTIPLIES = ("fused_mlp_kernel", "hidden_backward_kernel", "linear_kernel", "weight_grad_kernel")
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
# Width, hidden units and actions of what the configurations train: predictors' blocks with and without actions, the
# mask tokens' mixer (no normalisation, no residual), ViT-B's blocks.
SHAPES = {
    "block 384": (384, 1536, 16),
    "block 192": (192, 768, 16),
    "mixer 384": (384, 384, 16),
    "encoder 768": (768, 3072, 0),
}
# Sides of the patches that the configurations cut, and of ViT-H's.
PATCHES = (4, 8, 14, 16)


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch as the launchers made it: the kernel, its arguments by name, its options, and what it belongs to."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    shape: str


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


class _EveryCandidate:
    """In the tuner's place: launches all of an architecture's candidates one after another, a library's kernels too."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def run(self, product: str, _: torch.dtype, __: tuple[int, int, int], call: Any) -> Any:
        return [call(choice) for choice in candidates_of(self.arch, product)][-1]


def record_launches(arch: str, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every launch of all operators, forward and backward, at the sizes of SHAPES and PATCHES, distinct ones once."""
    found: dict[str, Launch] = {}

    def record(kernel: JITFunction, *_: Any, grid: Any, warmup: bool, **given: Any) -> None:
        arguments = {name: given[name] for name in kernel.arg_names}
        options = {name: value for name, value in given.items() if name not in arguments}
        launch = Launch(kernel, arguments, options, shape)
        found.setdefault(f"{kernel.__name__} {_signature(launch)} {options}", launch)

    before = JITFunction.run
    JITFunction.run = record
    try:
        with use_tuner(_EveryCandidate(arch)):
            for shape, launch in _works(dtype).items():  # noqa: B007  (shape is read by `record`)
                launch()
    finally:
        JITFunction.run = before
    return list(found.values())


def _works(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """What launches, by the name that reports give it. All on tensors without memory."""
    works: dict[str, Callable[[], None]] = {
        name: partial(_launch_block, *sizes, dtype) for name, sizes in SHAPES.items()
    }
    works |= {f"patches of {patch}": partial(_launch_patches, patch, dtype) for patch in PATCHES}
    return works | {
        "average by 4": partial(_launch_average, 64, dtype),
        "average by 1": partial(_launch_average, 63, dtype),
    }


def _empty(*shape: int, kind: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=kind, device="meta")


def _launch_patches(patch: int, dtype: torch.dtype) -> None:
    images, values = _empty(3, 8 * patch, 8 * patch, 3, kind=torch.uint8), 3 * patch * patch
    table = _empty(values, kind=torch.float32)
    for index in (_empty(63, kind=torch.int64), None):
        launch_patchify(images, index, index, table, table, patch, _empty(63, values, kind=dtype))


def _launch_average(elements: int, dtype: torch.dtype) -> None:
    averages = [_empty(elements, kind=torch.float32)]
    for copies in ([], [_empty(elements, kind=dtype)]):
        launch_average(averages, averages, copies, 0.25)


def _launch_block(width: int, hidden: int, actions: int, dtype: torch.dtype) -> None:
    """The MLP and the loss; 63 tokens, so that no kernel may count on a round number."""
    empty = partial(_empty, kind=dtype)
    tokens, images = 63, 3
    action = (empty(images, actions), empty(hidden, actions)) if actions else (None, None)
    norm = (None, None) if hidden == width else (empty(width), empty(width))
    cu_seqlens = _empty(images + 1, kind=torch.int32) if actions else None
    inputs: tuple[Any, ...] = (
        empty(tokens, width), empty(hidden, width), empty(hidden), empty(width, hidden), empty(width),
        *action, cu_seqlens, *norm, norm[0] is not None, 1e-6, "gelu",
    )  # fmt: skip
    _mlp_triton.forward(*inputs)
    backward_inputs: tuple[Any, ...] = (empty(tokens, width), *inputs, True)
    _mlp_triton.backward(*backward_inputs)
    loss = (empty(tokens, width), empty(200, width), _empty(tokens, kind=torch.int64), True, 1.0, 1e-6)
    grad = empty(tokens, width)
    launch_distance(*loss, sums=_empty(tokens, kind=torch.float32), grad=grad)
    for skip_one in (False, True):
        launch_distance(*loss, grad=grad, incoming=_empty(1, kind=torch.float32), skip_one=skip_one)
    _launch_stream(width, dtype)


def _launch_stream(width: int, dtype: torch.dtype) -> None:
    """What runs around a block and before the first: the residual stream's normalisation, the predictor's input."""
    empty = partial(_empty, kind=dtype)
    x, row, patches = empty(63, width), empty(width), _empty(63, kind=torch.int64)
    for branch in (None, x):
        normalise(x, row, row, 1e-6, branch=branch, total=None if branch is None else x)
    norm_backward(x, x, row, x, x, 1e-6)
    position, place, joined = empty(196, width), _empty(126, kind=torch.int64), empty(126, width)
    launch_assembly(x, patches, position, place, row, patches, None, joined)
    launch_assembly_backward(joined, place, x, empty(0, width), 63)
    launch_assembly(x, patches, position, place, None, None, x, joined)
    launch_assembly_backward(joined, place, x, x, 0)


def _signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types by name, constants and attributes by place, specialised as Triton's launcher does."""
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        if launch.kernel.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[i,] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            types[name] = _POINTER[value.dtype]
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Launch, arch: str, keep: Path | None = None) -> Report:
    """Compile for `arch` ("sm_90") and read what the assembler says; `keep`: a folder for the cubin."""
    types, constants, attributes = _signature(launch)
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
    instructions = [found.group(1) for found in _MATRIX.finditer(made.asm["ptx"])]
    return Report(
        kernel=name,
        arch=arch,
        shape=launch.shape,
        config=config,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        programs=min(fitting),
        matrix_instructions={kind: instructions.count(kind) for kind in sorted(set(instructions))},
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


def _rows(archs: list[str], keep: Path | None) -> Iterator[Report]:
    for arch in archs:
        for launch in record_launches(arch):
            yield compile_launch(launch, arch, keep)


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
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    args = parser.parse_args(words)
    if INTERPRETED.value:
        print("aot: TRITON_INTERPRET=1 is set; compiling needs a process without it", file=sys.stderr)
        return 2
    reports = []
    for report in _rows(args.arch, args.keep):
        reports.append(report)
        print(_line(report) + (f"  <- {report.fault}" if report.fault else ""), flush=True)
    if args.json is not None:
        document = {"schema": SCHEMA, "triton": triton.__version__, "rows": [asdict(report) for report in reports]}
        _write(args.json, json.dumps(document, indent=1) + "\n")
    if args.markdown is not None:
        _write(args.markdown, _markdown(reports))
    faults = [report for report in reports if report.fault]
    print(f"{len(reports)} kernels for {', '.join(args.arch)} with triton {triton.__version__}, {len(faults)} at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
