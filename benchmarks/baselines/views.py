"""Make the data pipeline's views with Pillow or torchvision, image by image, from the same sampled parameters.

`pillow`: Pillow's own operations, with the jitter as one matrix (`Image.convert`). `torchvision`: its v2 functions on
Pillow images, with the jitter's four parts in sequence. Both read the file each time and check only what decoding
checks; sampling of parameters and masks is not timed. `batches` runs either behind PyTorch's DataLoader.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from iwm_fast.actions.transforms import Jitter, Views, colour_matrix
from iwm_fast.benchmarks.baselines.kernels import Skipped

__all__ = ["Render", "batches", "pillow_views", "torchvision_functions", "torchvision_views"]

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Render = Callable[[Path, Views, int, int], Pair]


def _jittered(jitter: Jitter, row: int) -> bool:
    return bool(jitter.brightness[row] != 1 or jitter.contrast[row] != 1 or jitter.hue[row] != 0)


def pillow_views(path: Path, views: Views, row: int, size: int) -> Pair:
    """Return source and target, uint8 (S, S, 3) each, for row `row` of `views`."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    x, y, width, height = views.target_geometry.crop[row].tolist()
    base = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BILINEAR)
    if views.target_geometry.flip[row]:
        base = base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    source, target = (_pillow_jitter(base, jitter, row) for jitter in (views.source, views.target))
    if views.grayscale[row]:
        source = source.convert("L").convert("RGB")
    if views.blur_sigma[row] > 0:
        source = source.filter(ImageFilter.GaussianBlur(float(views.blur_sigma[row])))
    threshold = int(views.solarize_threshold[row])
    if threshold < 256:
        source = source.point([255 - level if level >= threshold else level for level in range(256)] * 3)
    return np.asarray(source), np.asarray(target)


def _pillow_jitter(image: Image.Image, jitter: Jitter, row: int) -> Image.Image:
    if not _jittered(jitter, row):
        return image
    return image.convert("RGB", tuple(colour_matrix(jitter.take(np.array([row])))[0].flatten().tolist()))


@cache
def torchvision_functions() -> Any:
    """Return torchvision.transforms.v2.functional; raise `Skipped` if it is not installed.

    With a torch that its compiled library was not built for, torchvision fails when it declares that library's
    operators. The transforms do not use them, so their declarations are skipped.
    """
    declare = torch.library.register_fake

    def lenient(operator: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return declare(operator, *rest, **options)

    torch.library.register_fake = lenient
    try:
        return importlib.import_module("torchvision.transforms.v2.functional")
    except ModuleNotFoundError as missing:
        raise Skipped(
            "torchvision is not installed; run pip install --no-deps 'torchvision==0.28.0' (for torch 2.13)"
        ) from missing
    finally:
        torch.library.register_fake = declare


def torchvision_views(path: Path, views: Views, row: int, size: int) -> Pair:
    """`pillow_views` with torchvision's functions; its contrast and hue have other formulas."""
    functions = torchvision_functions()
    with Image.open(path) as file:
        image = file.convert("RGB")
    x, y, width, height = views.target_geometry.crop[row].tolist()
    base = functions.resized_crop(image, y, x, height, width, [size, size], antialias=True)
    if views.target_geometry.flip[row]:
        base = functions.horizontal_flip(base)
    source, target = (_torchvision_jitter(functions, base, jitter, row) for jitter in (views.source, views.target))
    if views.grayscale[row]:
        source = functions.rgb_to_grayscale(source, 3)
    sigma = float(views.blur_sigma[row])
    if sigma > 0:
        taps = 2 * math.ceil(3 * sigma) + 1
        source = functions.gaussian_blur(source, [taps, taps], [sigma, sigma])
    if views.solarize_threshold[row] < 256:
        source = functions.solarize(source, int(views.solarize_threshold[row]))
    return np.asarray(source), np.asarray(target)


def _torchvision_jitter(functions: Any, image: Image.Image, jitter: Jitter, row: int) -> Any:
    if not _jittered(jitter, row):
        return image
    out = functions.adjust_brightness(image, float(jitter.brightness[row]))
    out = functions.adjust_contrast(out, float(jitter.contrast[row]))
    out = functions.adjust_saturation(out, float(jitter.saturation[row]))
    return functions.adjust_hue(out, float(jitter.hue[row]) / 360)


class _Rendered(Dataset[Pair]):
    """Dataset whose item i is row i of `views`, from `paths[i]`."""

    def __init__(self, render: Render, paths: list[Path], views: Views, size: int) -> None:
        self.render, self.paths, self.views, self.size = render, paths, views, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> Pair:
        source, target = self.render(self.paths[item], self.views, item, self.size)
        return source.copy(), target.copy()  # Pillow's memory is read-only, and PyTorch warns of that


def batches(
    render: Render, paths: list[Path], views: Views, size: int, batch: int, workers: int
) -> Iterator[list[torch.Tensor]]:
    """Yield sources and targets, uint8 (B, S, S, 3), from PyTorch's DataLoader; workers=0 loads in this process."""
    # Spawned workers would import everything again for every repeat; forked ones inherit it.
    context = "fork" if workers else None
    return iter(
        DataLoader(
            _Rendered(render, paths, views, size),
            batch_size=batch,
            num_workers=workers,
            multiprocessing_context=context,
        )
    )
