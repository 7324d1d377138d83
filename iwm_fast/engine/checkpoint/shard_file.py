"""Write safetensors files tensor by tensor, with the SHA-256 of the bytes as they are written.

The library's own writer copies every tensor before writing, grows the file through a memory map that ends the process
on a full disk, and creates files of mode 600 whatever the umask. This one needs no further memory, raises OSError on a
full disk, and follows the umask. The layout is safetensors' (eight bytes of header length, a JSON header, the data),
and the library reads it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iwm_fast.atomic_files import sync_open
from iwm_fast.file_names import utf8_name

__all__ = ["file_sum", "shard_fault", "write_shard", "write_tensors"]

_ALIGNMENT = 8
_BLOCK = 1 << 20
_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write contiguous fp32 tensors of the CPU, sync, and return {bytes, sha256}. Raises OSError."""
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{key} is {tensor.dtype} on {tensor.device}; it must be contiguous fp32 on the CPU")
    return write_tensors(path, tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write tensors of any device and layout, sync, and return {bytes, sha256}; the file's mode follows the umask.

    Raises OSError, and ValueError for a dtype that safetensors files of this program do not hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{key} is {tensor.dtype}; it must be one of {', '.join(map(str, _NAMES))}")
        size = tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        parts = (_bytes(t) for t in tensors.values() if t.numel())
        for part in itertools.chain((memoryview(struct.pack("<Q", len(encoded)) + encoded),), parts):
            digest.update(part)
            written += part.nbytes
            at = 0
            while at < part.nbytes:
                at += file.write(part[at:]) or 0
        sync_open(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in order; no copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def shard_fault(path: Path, lengths: Mapping[str, int], metadata: Mapping[str, str]) -> str | None:
    """Return how the file's header contradicts the fragments (key: elements) that it should hold, or None."""
    try:
        with utf8_name(path) as file, safe_open(file, framework="pt") as shard:
            found = shard.metadata() or {}
            for name, expected in metadata.items():
                if found.get(name, expected) != expected:
                    return f"it says {name} {found[name]}, its place says {expected}"
            keys = set(shard.keys())
            for key, length in lengths.items():
                if key not in keys:
                    return f"{key} is not in it"
                part = shard.get_slice(key)
                if part.get_dtype() != "F32" or part.get_shape() != [length]:
                    return f"{key} is {part.get_dtype()} {part.get_shape()}, the index says F32 [{length}]"
    except (OSError, SafetensorError) as error:
        return f"not a readable safetensors file ({error})"
    return None


def file_sum(path: Path) -> dict[str, Any]:
    """Return {bytes, sha256} of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
