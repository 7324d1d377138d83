"""A finetuned result for use from Python: classes of images, or a class per pixel.

Shapes: B images of S × S pixels, L patches, D channels per token, C classes, G patches along a side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from iwm_fast.data.image_list import ImageSet
from iwm_fast.errors import UserError
from iwm_fast.eval.features import Kept
from iwm_fast.eval.finetune.modes import Mode, kept_for
from iwm_fast.eval.finetune.saved import Finetuned, load_finetuned
from iwm_fast.eval.world_model.given_images import Images, as_pictures, read_files
from iwm_fast.file_names import printable

__all__ = ["Classified", "FinetunedModel", "MissingMethodError", "open_finetuned"]

_TOP = 5
_OF_A_WORLD = ("action_names", "actions", "infer", "predict", "rank", "space", "targets", "vector")


class MissingMethodError(UserError, AttributeError):
    """A method of another kind of model; ``hasattr`` returns False for it."""


@dataclass(frozen=True)
class Classified:
    """The k most probable classes of each image, most probable first.

    names: B tuples of k names; probabilities: float32 (B, k), softmax over all classes; classes: int64 (B, k), their
    numbers.
    """

    names: tuple[tuple[str, ...], ...]
    probabilities: NDArray[np.float32]
    classes: NDArray[np.int64]


class FinetunedModel:
    """A run finetuned by `iwm-fast finetune`. Methods do not change it and record no gradients.

    Images are as for `WorldModel`. ``task``: a task of a multitask result, by name; optional if only one fits. Wrong
    arguments raise UserError, in one line.
    """

    def __init__(self, found: Finetuned, *, chunk: int = 64) -> None:
        """``chunk``: images per forward pass."""
        self.reader = found.reader
        self.results = found.results
        self._classes, self._dense, self._mode, self._chunk = found.classes, found.dense, found.mode, chunk

    def __getattr__(self, name: str) -> Any:
        """Refuse the methods of `WorldModel` in one line."""
        if name in _OF_A_WORLD:
            raise MissingMethodError(
                f"{name}: a finetuned result has no world model; load the run that it was finetuned from"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def image_size(self) -> int:
        """S, the side of its images in pixels."""
        return self.reader.encoder.image

    @property
    def device(self) -> torch.device:
        """The device of the model and of its results."""
        return next(self.reader.parameters()).device

    @property
    def mode(self) -> Mode:
        """Its finetuning mode: linear, attentive, predictor, end-to-end or multitask."""
        return self._mode

    @property
    def tasks(self) -> dict[str, str]:
        """Each task by name: classification or segmentation."""
        return {name: "segmentation" if dense else "classification" for name, dense in self._dense.items()}

    def class_names(self, task: str | None = None) -> tuple[str, ...]:
        """Return class names by number; for segments, their numbers in the masks as text."""
        return self._classes[self._task(task, None)]

    def read(self, files: ImageSet | Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Tensor:
        """Read image files as evaluation does, like `WorldModel.read`: uint8 (n, S, S, 3)."""
        if isinstance(files, str | os.PathLike):
            files = [files]
        return read_files(files if isinstance(files, ImageSet) else list(files), self.image_size)

    @torch.no_grad()
    def encode(self, images: Images) -> Tensor:
        """Return tokens (B, L, D) float32 of its encoder, which end-to-end finetuning has trained."""
        return torch.cat([self._tokens(part) for part in as_pictures(images, self.image_size).split(self._chunk)])

    @torch.no_grad()
    def logits(self, images: Images, *, task: str | None = None) -> Tensor:
        """Return logits float32 (B, C) of a classification, or (B, C, G, G), one per patch, of a segmentation."""
        return self._logits(images, self._task(task, None))

    @torch.no_grad()
    def classify(self, images: Images, *, top: int | None = None, task: str | None = None) -> Classified:
        """Return the ``top`` most probable classes of each image; default 5, or all if there are fewer."""
        name = self._task(task, dense=False)
        classes = self._classes[name]
        if top is not None and not (isinstance(top, int) and 1 <= top <= len(classes)):
            raise UserError(f"top is {top!r}; give 1 to {len(classes)}, the number of classes")
        logits = self._logits(images, name)
        found = logits.topk(top or min(_TOP, len(classes)), dim=1).indices  # as finetune counts top-1
        probabilities = logits.softmax(dim=1).gather(1, found)
        places = found.cpu().numpy()
        return Classified(
            tuple(tuple(classes[place] for place in row) for row in places.tolist()),
            probabilities.cpu().numpy(),
            places,
        )

    @torch.no_grad()
    def segment(self, images: Images, *, task: str | None = None) -> Tensor:
        """Return the class of each pixel: uint8 (B, S, S), for images as `read` shows them; numbers as in the masks."""
        logits = self._logits(images, self._task(task, dense=True))
        enlarged = (
            F.interpolate(part, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
            for part in logits.split(self._chunk)
        )
        return torch.cat([part.argmax(dim=1).to(torch.uint8) for part in enlarged])

    def _logits(self, images: Images, task: str) -> Tensor:
        kept = kept_for(self._mode, dense=self._dense[task])
        pictures = as_pictures(images, self.image_size).split(self._chunk)
        return torch.cat([self.reader(_as_learned(self._tokens(part), kept), task).float() for part in pictures])

    def _tokens(self, pictures: Tensor) -> Tensor:
        tokens: Tensor = self.reader.encoder(pictures.to(self.device)).unflatten(0, (len(pictures), -1))
        return tokens.float()

    def _task(self, task: str | None, dense: bool | None) -> str:
        """Return the task's name; ``dense``: require a segmentation (True) or a classification (False)."""
        kind = {None: "task", True: "segmentation", False: "classification"}[dense]
        there = ", ".join(f"{printable(name)} ({what})" for name, what in self.tasks.items())
        if task is not None:
            if task not in self._dense:
                raise UserError(f"task is {task!r}; this result has {there}")
            suited = [task] if dense in (None, self._dense[task]) else []
        else:
            suited = [name for name, one in self._dense.items() if dense in (None, one)]
        if not suited:
            instead = "classify" if dense else "segment"
            raise UserError(f"no {kind} in this result: it has {there}; use {instead}")
        if len(suited) > 1:
            raise UserError(f"task is missing: this result has {there}; give one")
        return suited[0]


def _as_learned(tokens: Tensor, kept: Kept) -> Tensor:
    """Return tokens (b, L, D) in the form that the head was trained on (`features.Kept`)."""
    if kept == "pooled":
        return tokens.mean(dim=1, keepdim=True)
    return tokens.half().float() if kept == "tokens" else tokens


def open_finetuned(folder: Path, device: torch.device) -> FinetunedModel:
    """Load a folder of ``iwm-fast finetune --out``. Raise UserError if a file is missing, damaged or changed."""
    found = load_finetuned(folder)
    found.reader.to(device)
    found.reader.encoder.to(device)  # while frozen it is no part of the reader
    return FinetunedModel(found)
