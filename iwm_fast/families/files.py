"""Read weights from a file or a folder, without unpickling anything and without holding a large file twice.

| what | read by |
|---|---|
| a safetensors file | a memory map |
| a state_dict file (.pt, .pth, .bin, .pth.tar) | torch.load with weights_only, memory-mapped where torch wrote a zip |
| a folder of transformers or timm | its config.json, and model.safetensors, pytorch_model.bin or shards |

Nested mappings (``{"model": {…}}``) become dotted names.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iwm_fast.errors import UserError, because
from iwm_fast.families.converted import LazyTensors, Pixels
from iwm_fast.file_names import printable, utf8_name

__all__ = ["Contents", "lazy_safetensors", "read_weights"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder, best first; each may be an index of shards
_INDEX = ".index.json"
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_SHARD = re.compile(r"\w[\w.-]*")
_CODE = re.compile(r"weights.only|unsupported (class|global|operand)|not allowed", re.IGNORECASE)


@dataclass(frozen=True)
class Contents:
    """All tensors of a file or folder, by name. config: of the folder, {} without one. files: those that were read."""

    place: str
    tensors: LazyTensors
    files: tuple[Path, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    pixels: Pixels | None = None


def read_weights(path: Path) -> Contents:
    """Return the tensors of a file or folder, each read when it is used. Raises UserError."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; name weights, or a folder that has them (nothing is downloaded by name)"
        )
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(_INDEX):
        raise UserError(f"{path}: is the index of a folder's weights; name the folder")
    # A file of a folder of weights belongs to the config.json beside it.
    beside = path.parent / _CONFIG
    if path.name in _WEIGHTS and beside.is_file():
        return _folder(path.parent)
    return Contents(str(path), _tensors(path), (path,))


def _folder(path: Path) -> Contents:
    present = [name for name in _WEIGHTS if (path / name).is_file() or (path / f"{name}{_INDEX}").is_file()]
    if not (path / _CONFIG).is_file():
        what = f"{present[0]} without config.json" if present else "neither config.json nor weights"
        raise UserError(
            f"{path}: has {what}; name a run, an export, a folder with both, or a file of weights whose names say its "
            "family"
        )
    config = _json(path / _CONFIG)
    if not present:
        raise UserError(f"{path}: has config.json, and no {' or '.join(_WEIGHTS)}; download the weights beside it")
    name = present[0]
    files = _shards(path, f"{name}{_INDEX}") if not (path / name).is_file() else (path / name,)
    tensors: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        found = _tensors(file)
        tensors |= {tensor: partial(found.__getitem__, tensor) for tensor in found}
    return Contents(str(path), LazyTensors(tensors), files, config, _pixels(path, config))


def _shards(folder: Path, index: str) -> tuple[Path, ...]:
    listed = _json(folder / index).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise UserError(f"{folder / index}: has no weight_map; download it again")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if not _SHARD.fullmatch(name) or not (folder / name).is_file():
            raise UserError(
                f"{folder / index}: names {printable(name)}, which is not there; download it beside the others"
            )
    return tuple(folder / name for name in names)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({because(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({printable(str(error))}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no mapping; download it again")
    return found


def _pixels(folder: Path, config: Mapping[str, Any]) -> Pixels | None:
    """What the folder's files say of the normalisation of pixels."""
    pretrained = config.get("pretrained_cfg")
    said = dict(pretrained) if isinstance(pretrained, Mapping) else {}
    mean, std = said.get("mean", config.get("mean")), said.get("std", config.get("std"))
    if (folder / _PREPROCESSOR).is_file():
        said = dict(_json(folder / _PREPROCESSOR))
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
        if said.get("do_normalize") is False:
            mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        return None
    if not all(isinstance(v, list | tuple) and len(v) == 3 and all(_number(x) for x in v) for v in (mean, std)):
        raise UserError(
            f"{folder}: its files say that pixels have mean {mean} and std {std}, which are not three numbers"
        )
    if min(std) <= 0:
        raise UserError(f"{folder}: its files say that pixels have std {std}; it must be above 0")
    return Pixels(tuple(map(float, mean)), tuple(map(float, std)))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _tensors(path: Path) -> LazyTensors:
    """The tensors of one file."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({because(error)})") from error
    if head[8:9] == b"{":
        return lazy_safetensors(path, "download it again")
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _state_dict(path, mapped=head[:2] == b"PK")
    raise UserError(f"{path}: is neither a safetensors file nor one of torch.save; give one of these")


def lazy_safetensors(path: Path, remedy: str) -> LazyTensors:
    """Return a safetensors file's tensors, each read when it is taken. UserError with the remedy if it is damaged."""
    try:
        with utf8_name(path) as name:
            file = safe_open(name, framework="pt")
        return LazyTensors({key: partial(file.get_tensor, key) for key in file.keys()})  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read whole ({printable(str(error))}); {remedy}") from error


def _state_dict(path: Path, *, mapped: bool) -> LazyTensors:
    if mapped and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: cannot be read whole (its end is missing); download it again")
    if mapped and path.suffix == ".npz":
        raise UserError(f"{path}: is of NumPy (JAX); save timm's model as safetensors with timm.models.save_for_hf")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        if _CODE.search(str(error)) is None:
            raise UserError(f"{path}: cannot be read whole ({_first_line(error)}); download it again") from error
        raise UserError(
            f"{path}: holds more than tensors, and reading that could run its code; if you trust it, keep its tensors: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pt'), with the name of its state_dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read whole ({_first_line(error)}); download it again") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, no state_dict; save a model's state_dict()")
    tensors = dict(_flat(loaded))
    return LazyTensors({name: partial(tensors.__getitem__, name) for name in tensors})


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])[:200]


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
