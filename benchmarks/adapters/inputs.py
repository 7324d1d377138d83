"""Inputs of all implementations in a comparison (shapes, batches, masks), and the check that they got the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.config.schema import ENCODERS
from iwm_fast.data.masks import PatchSets
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Inputs", "Masks", "Shape", "Side", "SideMissing", "draw_inputs", "draw_masks", "fingerprint", "normalised"]

Ints = NDArray[np.int64]


class SideMissing(Exception):  # noqa: N818  (a reason, not an error)
    """The reason why an implementation is not available."""


@dataclass(frozen=True)
class Shape:
    """One comparison: encoder by name, image and patch in pixels, predictor's depth and width, images per batch."""

    encoder: str
    image: int
    patch: int
    predictor_depth: int
    predictor_width: int
    batch: int

    @property
    def name(self) -> str:
        """The shape's label in tables and files."""
        model = {"vit_tiny": "ViT-Ti", "vit_base": "ViT-B", "vit_large": "ViT-L", "vit_micro": "ViT-micro"}
        return f"{model[self.encoder]}/{self.patch} {self.image} {self.predictor_depth}x{self.predictor_width}"

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @property
    def heads(self) -> int:
        """Heads of the encoder, and of the predictor, as in I-JEPA."""
        return ENCODERS[self.encoder].heads

    def config(self, conditioning: str, *, bf16: bool) -> Config:
        """Return the iwm-fast configuration that trains this shape."""
        predictor: dict[str, Any] = {
            "depth": self.predictor_depth, "width": self.predictor_width, "heads": self.heads,
            "conditioning": conditioning,
        }  # fmt: skip
        return Config.model_validate(
            {
                "model": {
                    "encoder": self.encoder, "image": self.image, "patch": self.patch, "predictor": predictor,
                },
                "train": {"global_batch": self.batch, "precision": "bf16" if bf16 else "fp32", "seed": 0},
                "zero": {"stage": 1 if bf16 else 0},
                "log": {"every_steps": 10**9, "tensorboard": False},
            }
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of B images: context int64 (B, Nc), blocks (K, B, Np), patch numbers ascending within a row.

    drawn: (B,), context patches of each image before all are cut to the batch's shortest.
    """

    context: Ints
    blocks: Ints
    drawn: Ints

    def unions(self) -> list[Ints]:
        """Return the distinct patches of each image's blocks, ascending, one array per image."""
        return [np.unique(self.blocks[:, i]) for i in range(self.blocks.shape[1])]

    def patch_sets(self) -> PatchSets:
        """Return them packed, as iwm-fast's data pipeline does."""
        unions = self.unions()
        lengths = np.full(len(self.context), self.context.shape[1], dtype=np.int64)
        asked = np.array([len(union) for union in unions], dtype=np.int64)
        return PatchSets(self.context.reshape(-1), lengths, np.concatenate(unions), asked)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch: uint8 pixels (B, S, S, 3) of both views, action (B, A), masks."""

    source: Tensor
    target: Tensor
    action: Tensor
    masks: Masks


class Side(Protocol):
    """One training step: `step` runs the optimizer on the next of its batches and returns the loss."""

    name: str
    version: str

    def step(self) -> float:
        """Run one step. The device may still be working when it returns, if the project's own code allows that."""

    def saw(self) -> list[str]:
        """Return `fingerprint` of each batch, from the tensors that `step` uses."""


def fingerprint(contexts: Sequence[Ints], targets: Sequence[Ints]) -> str:
    """Return SHA-256 of each image's context and predicted patches, independent of order and repetition."""
    digest = hashlib.sha256()
    for context, target in zip(contexts, targets, strict=True):
        for rows in (context, target):
            patches = np.unique(np.asarray(rows, dtype=np.int64))
            digest.update(np.int64(len(patches)).tobytes() + patches.tobytes())
    return digest.hexdigest()


def normalised(images: Tensor) -> Tensor:
    """Convert uint8 (B, S, S, 3) to float (B, 3, S, S), normalised as by torchvision's transforms."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.permute(0, 3, 1, 2) / 255 - mean) / std).contiguous()


def draw_masks(shape: Shape, generator: np.random.Generator) -> Masks:
    """Sample masks like I-JEPA: one block size per batch, contexts cut to the batch's shortest, at least ten patches.

    For comparisons without a checkout of ijepa; with one, its own sampler is used.
    """
    grid, count = shape.grid, 4

    def size(low: float, high: float, aspects: tuple[float, float]) -> tuple[int, int]:
        area, aspect = grid**2 * generator.uniform(low, high), generator.uniform(*aspects)
        height, width = (min(grid - 1, round(np.sqrt(area * factor))) for factor in (aspect, 1 / aspect))
        return height, width

    def rectangle(height: int, width: int) -> NDArray[np.bool_]:
        chosen = np.zeros((grid, grid), dtype=bool)
        top, left = generator.integers(0, grid - height + 1), generator.integers(0, grid - width + 1)
        chosen[top : top + height, left : left + width] = True
        return chosen

    block, square = size(0.15, 0.2, (0.75, 1.5)), size(0.85, 1.0, (1.0, 1.0))
    contexts: list[Ints] = []
    blocks: list[list[Ints]] = []
    while len(contexts) < shape.batch:
        mine = [rectangle(*block) for _ in range(count)]
        context = np.flatnonzero(rectangle(*square) & ~np.logical_or.reduce(mine))
        if len(context) > 10:
            contexts.append(context)
            blocks.append([np.flatnonzero(b) for b in mine])
    shortest = min(map(len, contexts))
    drawn = np.array([len(c) for c in contexts])
    return Masks(np.stack([c[:shortest] for c in contexts]), np.array(blocks).transpose(1, 0, 2), drawn)


def draw_inputs(shape: Shape, masks: Masks, actions: int, seed: int) -> Inputs:
    """Return random pixels and actions for given masks."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (shape.batch, shape.image, shape.image, 3)
    source, target = (torch.randint(0, 256, pixels, dtype=torch.uint8, generator=generator) for _ in range(2))
    return Inputs(source, target, torch.randn(shape.batch, actions, generator=generator), masks)
