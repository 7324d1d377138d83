"""The frames of triplets as evaluation reads them: whole, at the model's size, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config, DataConfig
from iwm_fast.data.eval_images import load_clean, whole_image
from iwm_fast.data.sources import top_level
from iwm_fast.data.sources.split_names import split_kind
from iwm_fast.data.triplet_windows import require_windows
from iwm_fast.data.triplets import Triplets, find_manifest, read_triplets
from iwm_fast.errors import UserError
from iwm_fast.eval.features import device_of
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.unusable import LeftOut
from iwm_fast.file_names import printable
from iwm_fast.models.iwm import IWM

__all__ = ["FrameReader", "encode_frames", "find_triplets", "open_triplets"]

_CHUNK = 64  # frames per forward pass


def open_triplets(root: str | Path, config: Config) -> Triplets:
    """Return the test triplets of the manifest that `find_triplets` finds.

    Raise UserError if there is none, if its actions are not the run's, or if it lacks the episodes that a history
    needs.
    """
    triplets = read_triplets(find_triplets(root)[0], config.actions.external)
    require_windows(triplets, config.model.history)
    return triplets


def find_triplets(root: str | Path) -> tuple[Path, list[str]]:
    """Return (the test manifest, the manifests beside it that are not used).

    ``root`` is the manifest, or a folder with one, or a folder whose test/ (else val/, see `data.split_layout`) has
    one; test/ comes first. Raise UserError if there is none, or two are equally good.
    """
    below: dict[str, list[Path]] = {"test": [], "val": []}
    for name in top_level(root)[0]:
        manifest = find_manifest(Path(root) / name) if split_kind(name) in below else None
        if manifest is not None:
            below[str(split_kind(name))].append(manifest)
    own = find_manifest(Path(root))
    order = [*below["test"], *below["val"], *([own] if own is not None else [])]
    if not order:
        raise UserError(
            f"{printable(str(root))}: this is no manifest of triplets, which the run was trained on: give a .jsonl "
            "or .parquet file, or a folder that holds manifest.jsonl, manifest.parquet, or test/ (or val/) with one"
        )
    first = below["test"] or below["val"]
    if len(first) > 1:
        names = " and ".join(printable(str(manifest.parent)) for manifest in first[:2])
        raise UserError(f"{names} both hold test triplets; give one of them")
    return order[0], [str(manifest) for manifest in order[1:]]


class FrameReader:
    """Reads frames by index into `frames`, at ``size``; those that cannot be decoded are in ``bad`` with the reason."""

    def __init__(self, triplets: Triplets, size: int, data: DataConfig) -> None:
        self.triplets = triplets
        self.left_out = LeftOut(str(triplets.manifest), len(triplets.frames), data.max_bad_fraction)
        self.data, self._size = data, size

    @property
    def bad(self) -> dict[str, str]:
        """Reasons by file."""
        return self.left_out.reasons

    def read(self, frames: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return uint8 (n, S, S, 3) on the CPU, and whether each was decoded, bool (n,); the others are black."""
        needed, place = np.unique(frames, return_inverse=True)
        files = self.triplets.frames.take(needed)
        pictures = torch.zeros(len(needed), self._size, self._size, 3, dtype=torch.uint8)
        good = np.zeros(len(needed), bool)
        for clean in load_clean(
            files,
            self._size,
            device=self.data.device,
            threads=self.data.threads,
            max_pixels=self.data.max_pixels,
            crop=whole_image,
            wait_s=self.data.wait_s,
            readers=self.data.readers,
            hw_decoder_load=self.data.hw_decoder_load,
        ):
            pictures[torch.from_numpy(clean.rows)] = clean.images.cpu()
            good[clean.rows] = True
            self.bad.update({files.name(row): reason for row, reason in clean.failed.items()})
        return pictures[torch.from_numpy(place)], good[place]


@torch.no_grad()
def encode_frames(
    model: IWM, data: DataConfig, triplets: Triplets, count: int
) -> tuple[NDArray[np.int64], Tensor, Tensor]:
    """Read and encode at most ``count`` frames, spread over the set; those that cannot be decoded are left out.

    Return their indices (n,), pictures uint8 (n, S, S, 3) on the CPU, and target representations float32 (n, L · D) on
    the model's device. Raise UserError where too many are left out.
    """
    reader = FrameReader(triplets, model.config.image, data)
    places = evenly_spaced(count, len(triplets.frames))
    pictures, good = reader.read(places)
    reader.left_out.check()
    pictures = pictures[torch.from_numpy(good)]
    device = device_of(model)
    parts = [model.targets(part.to(device)).float().flatten(1) for part in pictures.split(_CHUNK)]
    return places[good], pictures, torch.cat(parts)
