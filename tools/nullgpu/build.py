"""Make the environment and compile the stubs: those in stubs/, and one for each other function that is imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.nullgpu.place import FOLDER, PYTHON, packages

__all__ = ["build", "setup"]

STUBS = Path(__file__).resolve().parent / "stubs"
# As on the GPU machine that the project is measured on; Triton comes with this torch.
REQUIREMENTS = (
    "torch==2.11.0", "nvidia-dali-cuda130==2.4.0", "xformers==0.0.35", "deepspeed==0.19.8", "numpy<3", "pillow",
    "pydantic", "PyYAML", "typer", "rich", "safetensors", "tensorboard", "matplotlib", "packaging", "google-crc32c",
    "protobuf<8", "psutil", "pytest", "hypothesis",
)  # fmt: skip
_IMPORTING = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "torch_nvshmem")
_PREFIXES = ("cublas", "cusolver", "cusparse", "cufft", "cudnn", "nccl", "cuda", "__cuda", "curand")
# Registration of compiled kernels stays with the runtime that is linked in.
_LEFT_ALONE = frozenset(
    f"__cuda{name}"
    for name in (
        "RegisterFatBinary", "RegisterFatBinaryEnd", "RegisterFunction", "RegisterVar", "UnregisterFatBinary",
        "InitModule",
    )
)  # fmt: skip
_COMPUTES = re.compile(
    r"cublas(Lt)?[A-Z]?\w*(gemm|Gemm|Matmul$|gemv|trsm|dot|axpy|getrf|getrs|geqrf)\w*"
    r"|cudnn\w*(Forward|Backward|Execute|Convolution)\w*"
    r"|cusolverDn\w*(syev|gesv|potr|getr|geqr|orm|org)\w*"
)
_SENDS = re.compile(r"nccl(AllReduce|AllGather|ReduceScatter|Broadcast|Reduce|Send|Recv|AlltoAll)\w*")


def setup() -> int:
    """Install the CUDA build of PyTorch and what iwm-fast needs into an environment of their own; pip's exit code."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(PYTHON.parents[1])], check=True)
    return subprocess.run([str(PYTHON), "-m", "pip", "install", "-q", *REQUIREMENTS], check=False).returncode


def build() -> str:
    """Compile libnullrt.so, libcuda.so.1 and libcudart.so.12 into the folder; a line that says what was made."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(FOLDER / "tuning", ignore_errors=True)  # what was chosen by the times of other libraries
    site = packages()
    # The runtime's wheel has no crt headers; Triton's has.
    shim = FOLDER / "include/crt"
    shim.mkdir(parents=True, exist_ok=True)
    headers = site / "triton/backends/nvidia/include/crt/host_defines.h"
    (shim / "host_defines.h").write_bytes(headers.read_bytes())
    include = [f"-I{site / 'nvidia/cu13/include'}", f"-I{shim.parent}"]
    flags = ["-fPIC", "-O1", "-w"]
    objects = []
    for name in ("memory", "runtime", "libraries"):
        objects.append(FOLDER / f"{name}.o")
        _gcc("-c", *flags, *include, STUBS / f"{name}.c", "-o", objects[-1])
    written = _symbols(objects, "--defined-only")
    importing = [*(site / f"torch/lib/lib{name}.so" for name in _IMPORTING), site / "xformers/_C.so"]
    imported = _symbols(importing, "--undefined-only", "-D")
    rest = sorted(name for name in imported - written - _LEFT_ALONE if name.startswith(_PREFIXES))
    generated = FOLDER / "generated.c"
    generated.write_text("extern long nullgpu_library, nullgpu_collectives;\n" + "\n".join(map(_stub, rest)) + "\n")
    _gcc("-shared", *flags, *objects, generated, "-ldl", "-lpthread", "-o", FOLDER / "libnullrt.so")
    driver = ["-Wl,-soname,libcuda.so.1", f"-I{STUBS}", STUBS / "driver.c", "-ldl", "-o", FOLDER / "libcuda.so.1"]
    _gcc("-shared", *flags, *driver)
    # The CUDA 12 runtime, under which xformers was built: a version of its own, so that both may be loaded.
    versions = FOLDER / "runtime12.map"
    versions.write_text("libcudart.so.12 { global: *; };\n")
    named = ["-Wl,-soname,libcudart.so.12", f"-Wl,--version-script={versions}"]
    _gcc("-shared", *flags, *named, STUBS / "runtime12.c", "-o", FOLDER / "libcudart.so.12")
    return f"{FOLDER}: {len(imported & written)} functions by hand, {len(rest)} that only return"


def _stub(name: str) -> str:
    counted = "nullgpu_library++; " if _COMPUTES.fullmatch(name) else ""
    counted = "nullgpu_collectives++; " if _SENDS.fullmatch(name) else counted
    return f"long {name}(){{{counted}return 0;}}"


def _symbols(files: list[Path], *how: str) -> set[str]:
    said = subprocess.run(["nm", *how, *map(str, files)], capture_output=True, text=True, check=True).stdout
    return {re.split(r"@", line.split()[-1])[0] for line in said.splitlines() if line.strip() and line[-1] != ":"}


def _gcc(*words: object) -> None:
    subprocess.run(["gcc", *map(str, words)], check=True)
