"""Diagnosis of this installation: each part's version, whether a run here uses it, and why not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata

from packaging.requirements import Requirement

from iwm_fast.cli.machine import Part, examine_machine
from iwm_fast.environment import cpu_name, installed_version, usable_cores
from iwm_fast.errors import UserError

__all__ = ["Part", "examine", "part_rows"]


def _bounds(package: str) -> str:
    """Return what is wrong with an installed version, by the tested bounds; empty if nothing is."""
    try:
        declared = metadata.requires("iwm-fast") or []
    except metadata.PackageNotFoundError:
        return ""  # a checkout that is not installed has no metadata
    version = installed_version(package)
    for text in declared:
        requirement = Requirement(text)
        if requirement.name == package and version and not requirement.specifier.contains(version, prereleases=True):
            return f"; version {version} is outside the tested {requirement.specifier}"
    return ""


def _imported(module: str) -> str:
    """Return why a module cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library that does not load
        return f"does not import: {' '.join(str(error).split())}"
    return ""


def _part(name: str, package: str, module: str, judge: Callable[[], tuple[bool, str]]) -> Part:
    """Return a package's part: absent, not importable, or with the (used, reason) of ``judge``."""
    version = installed_version(package)
    if version is None:
        return Part(name, None, False, f"not installed: pip install {package}", broken=True)
    wrong = _imported(module)
    if wrong:
        return Part(name, version, False, wrong + _bounds(package), broken=True)
    used, reason = judge()
    return Part(name, version, used, reason + _bounds(package))


def _torch() -> tuple[bool, str]:
    return True, f"models and autograd; {usable_cores()} usable cores of {cpu_name()}"


def _cuda() -> Part:
    import torch

    if torch.version.cuda is None:
        return Part("CUDA", None, False, "this build of torch is for the CPU")
    if not torch.cuda.is_available():
        return Part("CUDA", torch.version.cuda, False, "no GPU or no driver is visible")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Part("CUDA", torch.version.cuda, True, names)


def _triton() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return False, "no GPU: the kernels run as their plain PyTorch references"
    from iwm_fast.kernels import conditioned_mlp

    x, square, row = (torch.zeros(*shape, device="cuda") for shape in ((1, 16), (16, 16), (16,)))
    try:
        conditioned_mlp(x, square, row, square, row, backend="triton")
    except RuntimeError as error:  # no compiler, or no driver
        return False, str(error)
    return True, "kernels of the conditioned MLP and of the loss"


def _xformers() -> tuple[bool, str]:
    import torch

    from iwm_fast.models.attention import describe_attention
    from iwm_fast.models.xformers_operators import dispatched

    if not torch.cuda.is_available():
        return False, "its operators need a GPU: attention is PyTorch's SDPA"
    device = torch.device("cuda", torch.cuda.current_device())
    return True, f"packed attention, {dispatched(device)}; model.attention=auto is {describe_attention('auto', device)}"


def _deepspeed() -> tuple[bool, str]:
    return True, "training engine, ZeRO stages 0 to 3"


def _dali() -> tuple[bool, str]:
    """Decode a JPEG by DALI on a run's device: an import alone does not test its libraries."""
    import torch

    from iwm_fast.data.views.gpu_decoder import gpu_decoder, jpeg_engine, probe

    try:
        if not torch.cuda.is_available():
            probe(None)
            return True, "decodes and augments, on the CPU"
        found = gpu_decoder(torch.cuda.current_device())
    except UserError as error:
        return False, str(error)
    slower = f" (slower; {found.refused})" if found.refused else ""
    return True, f"decodes and augments, on the GPU by decoders.{found.path}{slower}; {jpeg_engine()}"


def _collectives() -> Iterator[Part]:
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    if nccl is None:
        yield Part("NCCL", None, False, "this build of torch has none", broken=on_gpu)
    else:
        yield Part("NCCL", nccl, on_gpu, "ranks on GPUs" if on_gpu else "no GPU: ranks use gloo")
    if dist.is_gloo_available():
        yield Part("gloo", None, not on_gpu, "ranks on GPUs use NCCL" if on_gpu else "ranks on the CPU")
    else:
        yield Part("gloo", None, False, "this build of torch has none", broken=not on_gpu)


def examine() -> list[Part]:
    """Examine every part; nothing is changed. Torch comes first: the others need it."""
    torch_part = _part("torch", "torch", "torch", _torch)
    if torch_part.broken:
        return [torch_part]
    dali = _part("DALI", "nvidia-dali-cuda130", "nvidia.dali", _dali)
    return [
        torch_part,
        _cuda(),
        _part("Triton", "triton", "triton", _triton),
        _part("xformers", "xformers", "xformers.ops", _xformers),
        _part("DeepSpeed", "deepspeed", "deepspeed", _deepspeed),
        dali if dali.used else replace(dali, broken=True),
        *_collectives(),
        *examine_machine(),
    ]


def part_rows(parts: list[Part]) -> list[tuple[str, str, str, str]]:
    """Return the diagnosis as table rows: part, version, used, reason."""
    used = ("no", "yes")
    return [(p.part, p.version or "–", "broken" if p.broken else used[p.used], p.reason) for p in parts]
