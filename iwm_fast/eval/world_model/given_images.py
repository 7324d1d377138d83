"""Convert the images given to `iwm_fast.load` to uint8 pictures of the model's size; each mistake is one line.

Files, and Pillow images of another size, are converted as in evaluation: upright, the centred largest square, resized.
Arrays and tensors are used unchanged: uint8, channels last, of the model's size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iwm_fast.data.decode.levels import PILLOW_ERRORS, upright_rgb
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.errors import UserError

__all__ = ["Images", "as_pictures", "as_windows", "read_files"]

One = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images = One | ImageSet | Sequence[One]

_WANTED = "a path, a PIL image, a uint8 array or tensor ({size}, {size}, 3), a batch of these, or a list"


def as_pictures(images: Images, size: int) -> Tensor:
    """Return uint8 (B, size, size, 3), B at least 1. Raise UserError for anything that is not `Images`."""
    if isinstance(images, ImageSet):
        return _some(read_files(images, size))
    items = _items(images, "images")
    parts: list[Tensor | None] = [None] * len(items)
    files = [place for place, (_, item) in enumerate(items) if isinstance(item, str | os.PathLike)]
    if files:
        found = read_files([items[place][1] for place in files], size)
        for place, picture in zip(files, found, strict=True):
            parts[place] = picture[None]
    for place, (where, item) in enumerate(items):
        if isinstance(item, Image.Image):
            parts[place] = _of_pillow(item, size, where)
        elif parts[place] is None:
            parts[place] = _of_array(item, size, where)
    return _some(torch.cat([part for part in parts if part is not None]))


def as_windows(frames: Images, size: int, length: int) -> Tensor:
    """Return windows of `length` successive frames, uint8 (B, length, size, size, 3), the oldest first.

    frames: arrays or tensors (B, length, size, size, 3); or `Images`, each of which stands for all frames of its
    window, as at an episode's beginning. Raise UserError for another length.
    """
    if not isinstance(frames, np.ndarray | Tensor) or frames.ndim != 5:
        return as_pictures(frames, size)[:, None].expand(-1, length, -1, -1, -1)
    if (found := int(frames.shape[1])) != length:
        raise UserError(f"images are windows of {found} frames: this model takes windows of {length} (model.history)")
    windows: Tensor = as_pictures(frames.reshape(-1, *frames.shape[2:]), size).unflatten(0, (-1, length))
    return windows


def read_files(files: ImageSet | Sequence[str | os.PathLike[str]], size: int) -> Tensor:
    """Read image files as evaluation does, uint8 (n, size, size, 3). UserError names the first that is no image."""
    images = files if isinstance(files, ImageSet) else _image_set(files)
    parts = []
    for clean in load_clean(images, size) if len(images) else ():
        if clean.failed:
            row, reason = next(iter(clean.failed.items()))
            raise UserError(f"{images.name(row)}: {reason}")
        parts.append(clean.images.cpu())
    return torch.cat(parts) if parts else torch.zeros(0, size, size, 3, dtype=torch.uint8)


def _image_set(files: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """Return files of any folder as a source, as if the whole disk were one folder of images."""
    names = []
    for number, file in enumerate(files):
        if not isinstance(file, str | os.PathLike):
            raise UserError(f"files[{number}] is {_kind(file)}; give paths of image files")
        if is_address(os.fspath(file)):
            raise UserError(f"{file}: in an object store; give iwm_fast.data.image_list.list_images of its folder")
        path = Path(file)
        if path.is_dir():
            raise UserError(
                f"{path}: a folder; name its image files, or give iwm_fast.data.image_list.list_images of it"
            )
        if not path.exists():
            raise UserError(f"{path}: no such file; check the path")
        names.append(str(path.absolute())[1:])
    return ImageSet(FolderSource(LocalStorage(Path("/")), names))


def _items(images: Any, where: str) -> list[tuple[str, Any]]:
    """Return (its name in errors, item) for each item of arbitrarily nested lists."""
    if isinstance(images, np.ndarray) and images.dtype.kind == "U":
        images = images.tolist()
    if isinstance(images, list | tuple):
        if not images:
            raise UserError(f"{where}: empty; give at least one image")
        return [found for place, item in enumerate(images) for found in _items(item, f"{where}[{place}]")]
    return [(where, images)]


def _of_pillow(picture: Image.Image, size: int, where: str) -> Tensor:
    """Return uint8 (1, size, size, 3): unchanged if it has the model's size, else as a file of it would be read."""
    try:
        levels = upright_rgb(picture)
    except PILLOW_ERRORS as error:
        raise UserError(f"{where}: cannot be decoded ({' '.join(str(error).split())})") from error
    if levels.shape[:2] == (size, size):
        return torch.from_numpy(np.array(levels))[None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.ppm"
        Image.fromarray(levels).save(path)
        return read_files([path], size)


def _of_array(given: Any, size: int, where: str) -> Tensor:
    """Return uint8 (b, size, size, 3) of an array or tensor that is that already, or one picture of it."""
    if not isinstance(given, np.ndarray | Tensor):
        raise UserError(f"{where}: found {_kind(given)}; give {_WANTED.format(size=size)}")
    shape, dtype = tuple(given.shape), str(given.dtype).removeprefix("torch.")
    if dtype != "uint8" or shape[-3:] != (size, size, 3) or len(shape) not in (3, 4):
        raise UserError(
            f"{where} are {dtype} {shape}: this model takes uint8 ({size}, {size}, 3), alone or in a batch; "
            + _what_to_do(given, dtype, shape, size)
        )
    tensor = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    return tensor[None] if tensor.ndim == 3 else tensor


def _what_to_do(given: np.ndarray | Tensor, dtype: str, shape: tuple[int, ...], size: int) -> str:
    if dtype != "uint8":
        return _to_uint8(given, dtype)
    if len(shape) > 2 and shape[-3] == 3 and shape[-1] != 3:
        return "channels come last: np.moveaxis(x, -3, -1), or x.movedim(-3, -1) of a tensor"
    if shape[-1:] == (4,):
        return "leave alpha out: x[..., :3]"
    if shape[-1:] == (1,) or shape[-2:] == (size, size):
        return "repeat the one channel three times, or give PIL.Image.fromarray of it"
    return "PIL.Image.fromarray of it, or a path, is cropped and resized"


def _to_uint8(given: np.ndarray | Tensor, dtype: str) -> str:
    """Say how to convert other values to levels 0 to 255, by their range."""
    if ("float" not in dtype and "int" not in dtype) or not np.prod(tuple(given.shape)):
        return "give levels 0 to 255 as uint8"
    low, high = float(given.min()), float(given.max())
    if "int" in dtype:
        return "convert it to uint8" if low >= 0 and high <= 255 else f"{low:g} to {high:g} are no levels 0 to 255"
    if low >= 0 and high <= 1:
        return "these are 0 to 1: give (255 * x).round() as uint8"
    if low >= 0 and high <= 255:
        return "give x.round() as uint8"
    return f"{low:.3g} to {high:.3g} are no levels: give 0 to 255 as uint8, before any normalisation"


def _some(pictures: Tensor) -> Tensor:
    if not len(pictures):
        raise UserError("images: empty; give at least one")
    return pictures


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
