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
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iwm_fast.atomic_files import sync_open
from iwm_fast.file_names import utf8_name

__all__ = ["ShardReader", "file_sum", "shard_fault", "write_shard", "write_tensors"]

_ALIGNMENT = 8
_BLOCK = 1 << 20
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors
_LARGEST_READ = 1 << 30  # a call of Linux reads at most 2 GiB
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


def shard_fault(
    path: Path, lengths: Mapping[str, int], metadata: Mapping[str, str], header_sha256: str | None = None
) -> str | None:
    """Return how the file's header contradicts its SHA-256 and the fragments (key: elements) that it should hold, or
    None.
    """
    try:
        with utf8_name(path) as file, safe_open(file, framework="pt"):  # which checks offsets and sizes
            pass
        with ShardReader(path) as shard:
            if header_sha256 not in (None, shard.header_sha256):
                return "its header is not the one that was written (SHA-256 differs)"
            found = shard.metadata
            for name, expected in metadata.items():
                if found.get(name, expected) != expected:
                    return f"it says {name} {found[name]}, its place says {expected}"
            for key, length in lengths.items():
                if key not in shard.entries:
                    return f"{key} is not in it"
                entry = shard.entries[key]
                if entry["dtype"] != "F32" or entry["shape"] != [length]:
                    return f"{key} is {entry['dtype']} {entry['shape']}, the index says F32 [{length}]"
    except (OSError, ValueError, SafetensorError) as error:
        return f"not a readable safetensors file ({error})"
    return None


class ShardReader:
    """Read ranges of a safetensors file's fp32 tensors, and nothing else of it.

    Raises OSError, and ValueError where it is no such file. bytes_read: header and ranges so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY)
        try:
            length = int.from_bytes(self._bytes(0, 8), "little")
            encoded = self._bytes(8, length if length <= _LARGEST_HEADER else -1)
            self.header_sha256 = hashlib.sha256(encoded).hexdigest()
            self._data, self.bytes_read = 8 + length, 8 + length
            self.entries: dict[str, Any] = json.loads(encoded)
            if not isinstance(self.entries, dict):
                raise ValueError("the header is no table")  # noqa: TRY004, TRY301  (of a file's content)
            self.metadata: dict[str, str] = self.entries.pop("__metadata__", {})
        except (OSError, ValueError):
            self.close()
            raise
        except RecursionError as error:
            self.close()
            raise ValueError("a header nested too deeply") from error

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    __del__ = close

    def read(self, key: str, first: int, out: Tensor) -> None:
        """Copy elements ``first`` … of the fp32 tensor ``key`` into ``out``, 1-D and contiguous on the CPU."""
        entry = self.entries.get(key)
        if entry is None or entry["dtype"] != "F32":
            raise ValueError(f"{key} is not in it in fp32")
        begin, end = entry["data_offsets"]
        at = begin + 4 * first
        if at + 4 * out.numel() > end:
            raise ValueError(f"{key} has {(end - begin) // 4} elements, not {first + out.numel()}")
        view = _bytes(out)
        done = 0
        while done < view.nbytes:
            got = os.preadv(self._file, [view[done : done + _LARGEST_READ]], self._data + at + done)
            if not got:
                raise ValueError("it is truncated")
            done += got
        self.bytes_read += view.nbytes

    def _bytes(self, at: int, length: int) -> bytes:
        if length < 0:
            raise ValueError("its header is too long")
        found = os.pread(self._file, length, at)
        if len(found) != length:
            raise ValueError("it is truncated")
        return found


def file_sum(path: Path) -> dict[str, Any]:
    """Return {bytes, sha256} of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
