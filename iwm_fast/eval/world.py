"""A trained world model to work with from Python: encode, predict, rank, and find the action between two images.

    world = iwm_fast.load("runs/a")
    pictures = world.read(["cat.jpg", "dog.jpg"])
    brighter = world.predict(pictures, {"brightness": 0.3})
    nearest = world.rank(pictures, {"brightness": 0.3}, bank).order[:, 0]
    world.infer(pictures[0], other).values["brightness"]

Shapes: B images of S × S pixels, L patches each, D numbers a token, A components of an action, N items of a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from iwm_fast.actions import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.data.clean import load_clean
from iwm_fast.data.files import ImageSet
from iwm_fast.data.sources.folder import FolderSource
from iwm_fast.data.sources.storage import LocalStorage
from iwm_fast.engine.loading import EXPORT_FILE, default_device, load_export, load_model
from iwm_fast.errors import UserError
from iwm_fast.eval.distances import euclidean, unit_means
from iwm_fast.eval.features import EncoderName, default_encoder
from iwm_fast.eval.inference import jitter_bounds, search_action
from iwm_fast.models.iwm import IWM

__all__ = ["Action", "Images", "Inferred", "Ranking", "WorldModel", "load_world"]

# uint8 RGB (S, S, 3) or (B, S, S, 3); a picture of Pillow's in any mode; or several of either.
Images = Tensor | np.ndarray | Image.Image | Sequence["Tensor | np.ndarray | Image.Image"]
# Physical values by name (what is not named is neutral; of jitter, target minus source), or vectors (A,) or (B, A).
Action = Mapping[str, float] | np.ndarray | Tensor | Sequence[float]


@dataclass(frozen=True)
class Ranking:
    """order: int64 (B, N), places in the bank, nearest first; distances: float64 (B, N), of each item of the bank."""

    order: NDArray[np.int64]
    distances: NDArray[np.float64]


@dataclass(frozen=True)
class Inferred:
    """The action that explains a target best: as a vector (A,) float32 and as physical values by name.

    distance: L2 over all tokens from the prediction under that action to the target; distance_neutral: the same for the
    prediction of no change.
    """

    action: NDArray[np.float32]
    values: dict[str, float]
    distance: float
    distance_neutral: float


class WorldModel:
    """A trained model with its vocabulary of actions. All methods leave it as it is and keep no gradients.

    What is asked of it wrongly (a size, a name) raises UserError, in one line.
    """

    def __init__(
        self, model: IWM, actions: ActionsConfig, space: ActionSpace, *, step: int = 0, chunk: int = 64
    ) -> None:
        """``chunk``: images that go through a network at once."""
        self.model = model.eval()
        self.actions = actions
        self.space = space
        self.step = step
        self._chunk = chunk

    @property
    def image_size(self) -> int:
        """S, the side of its images in pixels."""
        return self.model.config.image

    @property
    def action_names(self) -> tuple[str, ...]:
        """The components of an action, in the vector's order."""
        return self.space.names

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its tensors lie."""
        return next(self.model.parameters()).device

    def read(self, files: ImageSet | Sequence[Path | str]) -> Tensor:
        """Image files as evaluation reads them: upright, the centred largest square, resized; uint8 (n, S, S, 3).

        Or images of any source, from `data.files.list_images`. UserError naming the first that cannot be decoded.
        """
        images = files if isinstance(files, ImageSet) else _image_set(files)
        parts = []
        for clean in load_clean(images, self.image_size) if len(images) else ():
            if clean.failed:
                row, reason = next(iter(clean.failed.items()))
                raise UserError(f"{images.name(row)}: {reason}")
            parts.append(clean.images.cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.image_size, self.image_size, 3, dtype=torch.uint8)

    @torch.no_grad()
    def encode(self, images: Images, which: EncoderName | None = None) -> Tensor:
        """Tokens (B, L, D) float32 of all patches.

        ``which``: the "context" encoder, which the predictor reads, or the "target" encoder, whose features serve other
        tasks best; default: the target's where it is a moving average of its own.
        """
        chosen = default_encoder(self.model.config) if which is None else which
        if chosen not in ("target", "context"):
            raise UserError(f"which is {which!r}: it is target or context")
        return self._through(lambda part: self.model.encode(part, chosen), self._pictures(images))

    @torch.no_grad()
    def targets(self, images: Images) -> Tensor:
        """What predictions are compared with, (B, L, D) float32: target tokens, normalised as in training."""
        return self._through(self.model.targets, self._pictures(images))

    @torch.no_grad()
    def predict(self, images: Images, action: Action) -> Tensor:
        """The representation (B, L, D) float32 that the images would have after the action: compare with `targets`.

        One action for all images, or one an image.
        """
        pictures = self._pictures(images)
        rows = self.vector(action)
        if rows.ndim == 1:
            rows = np.tile(rows, (len(pictures), 1))
        if len(rows) != len(pictures):
            raise UserError(f"action has {len(rows)} rows for {len(pictures)} images: give one action, or one an image")
        told = torch.from_numpy(rows).to(self.device)
        parts = zip(pictures.split(self._chunk), told.split(self._chunk), strict=True)
        return torch.cat([self._answer(self.model.encode(part.to(self.device)), row) for part, row in parts])

    @torch.no_grad()
    def rank(
        self, images: Images, action: Action, bank: Images | Tensor, *, distance: Literal["l2", "cosine"] = "l2"
    ) -> Ranking:
        """The bank by its nearness to what the action makes of each image.

        ``bank``: images, or their `targets` (N, L, D), computed once for many questions. ``distance``: L2 over all
        tokens, or cosine of the mean tokens (as the chord of unit vectors, which orders alike).
        """
        if distance not in ("l2", "cosine"):
            raise UserError(f"distance is {distance!r}: it is l2 or cosine")
        known = isinstance(bank, Tensor) and bank.is_floating_point()
        items = bank.to(self.device) if known and isinstance(bank, Tensor) else self.targets(bank)
        asked = self.predict(images, action)
        if items.ndim != 3 or items.shape[1:] != asked.shape[1:]:
            raise UserError(f"bank is {tuple(items.shape)}: its items are targets of shape {tuple(asked.shape[1:])}")
        pairs = (asked.flatten(1), items.flatten(1)) if distance == "l2" else (unit_means(asked), unit_means(items))
        distances = euclidean(*pairs).cpu().numpy()
        return Ranking(np.argsort(distances, axis=1, kind="stable"), distances)

    @torch.no_grad()
    def infer(
        self, source: Images, target: Images, *, bounds: Mapping[str, tuple[float, float]] | None = None
    ) -> Inferred:
        """The action that explains one target image from one source image, by search through the predictor.

        ``bounds``: the components that are searched with their lowest and highest physical values; the others stay
        neutral. Default: the colour jitter that training drew, as far as two of its views can be apart.
        """
        pair = [self._pictures(source), self._pictures(target)]
        if any(len(one) != 1 for one in pair):
            raise UserError(f"source and target are {len(pair[0])} and {len(pair[1])} images: give one of each")
        z, wanted = self.model.encode(pair[0].to(self.device)), self.targets(pair[1])[0]
        box = jitter_bounds(self.actions, self.space) if bounds is None else self._box(bounds)

        def answer(rows: Tensor) -> Tensor:
            parts = rows.split(self._chunk)
            return torch.cat([self._answer(z.expand(len(part), -1, -1), part) for part in parts])

        found = search_action(answer, wanted, box)
        neutral = answer(torch.zeros(1, self.space.dim, device=self.device))[0]
        values = {name: float(value[0]) for name, value in self.space.decode(found.action[None]).items()}
        return Inferred(found.action, values, found.distance, float((neutral - wanted).double().norm()))

    def vector(self, action: Action) -> NDArray[np.float32]:
        """An action as the predictor is told it: float32 (A,) of named values, (A,) or (B, A) of vectors."""
        if isinstance(action, Mapping):
            try:
                return self.space.vector(action)
            except ValueError as error:
                raise UserError(f"action: {error}") from error
        rows = np.asarray(action.cpu() if isinstance(action, Tensor) else action, np.float32)
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.space.dim:
            names = ", ".join(self.action_names)
            raise UserError(f"action is {rows.shape}: it has {self.space.dim} numbers ({names}), or is named values")
        return rows

    def _box(self, bounds: Mapping[str, tuple[float, float]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        ends = [self.vector({name: pair[end] for name, pair in bounds.items()}) for end in (0, 1)]
        return np.minimum(*ends), np.maximum(*ends)

    def _answer(self, z: Tensor, action: Tensor) -> Tensor:
        return self.model.predict(z, action).float()

    def _through(self, network: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        return torch.cat([network(part.to(self.device)).float() for part in pictures.split(self._chunk)])

    def _pictures(self, images: Images) -> Tensor:
        """Whatever was given as uint8 (B, S, S, 3)."""
        if isinstance(images, list | tuple):
            if not images:
                raise UserError("images: there is none")
            return torch.cat([self._pictures(image) for image in images])
        if isinstance(images, Image.Image):
            images = np.asarray(images.convert("RGB"))
        given = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
        pictures = given[None] if given.ndim == 3 else given
        size = self.image_size
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or tuple(pictures.shape[1:]) != (size, size, 3):
            found = f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            raise UserError(
                f"images are {found}: this model takes uint8 ({size}, {size}, 3), alone or in a batch; "
                "WorldModel.read crops and resizes image files"
            )
        if not len(pictures):
            raise UserError("images: there is none")
        return pictures


def _image_set(files: Sequence[Path | str]) -> ImageSet:
    """Files of any folder, as the source that they would be if the whole disk were one folder of images."""
    return ImageSet(FolderSource(LocalStorage(Path("/")), [str(Path(file).absolute())[1:] for file in files]))


def load_world(path: Path, *, checkpoint: str = "latest", device: str | None = None) -> WorldModel:
    """The world model of a run's folder or of an export. UserError where it is neither, or damaged.

    ``checkpoint``: of a run, latest or a name such as step_000500. ``device``: default the GPU where there is one.
    """
    if (path / EXPORT_FILE).exists() and not (path / "config.yaml").exists():
        if checkpoint != "latest":
            raise UserError(f"{path}: an export, which holds one checkpoint; leave out {checkpoint}")
        model, actions, space, step = load_export(path)
    else:
        model, config, space, step = load_model(path, checkpoint)
        actions = config.actions
    return WorldModel(model.to(device or default_device()), actions, space, step=step)
