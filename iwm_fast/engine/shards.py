"""One shard of a checkpoint: a safetensors file written tensor by tensor, its sum taken from the bytes on their way.

The library's own writer copies every tensor before it writes any, and a file that grows on a full disk through a
memory map ends the process. Here memory stays at what the caller holds, and a full disk is an OSError. The layout is
safetensors' (eight bytes of header length, a JSON header, the data), and the library reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["file_sum", "shard_fault", "write_shard"]

_ALIGNMENT = 8
_BLOCK = 1 << 20


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write contiguous fp32 tensors of the CPU, sync, and return {bytes, sha256}. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{key} is {tensor.dtype} on {tensor.device}; it must be contiguous fp32 on the CPU")
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        parts = (t.detach().numpy().data.cast("B") for t in tensors.values() if t.numel())
        for part in (memoryview(struct.pack("<Q", len(encoded)) + encoded), *parts):
            digest.update(part)
            written += part.nbytes
            at = 0
            while at < part.nbytes:
                at += file.write(part[at:]) or 0
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def shard_fault(path: Path, lengths: Mapping[str, int], metadata: Mapping[str, str]) -> str | None:
    """What the file's header contradicts of the fragments (key: elements) it should hold, or None."""
    try:
        with safe_open(path, framework="pt") as shard:
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
    """{bytes, sha256} of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
