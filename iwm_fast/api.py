"""A trained world model to work with from Python: encode, predict, rank, and find the action between two images.

A finetuned result opens likewise, and classifies or segments (`FinetunedModel`).

    world = iwm_fast.load("runs/a")
    features = world.encode("cat.jpg")
    pictures = world.read(["cat.jpg", "dog.jpg"])
    brighter = world.predict(pictures, {"brightness": 0.3})
    nearest = world.rank(pictures, {"brightness": 0.3}, bank).order[:, 0]
    world.infer(pictures[0], other).values["brightness"]

    finetuned = iwm_fast.load("runs/a-photos")
    finetuned.classify(["cat.jpg", "dog.jpg"]).names
    finetuned.segment("street.jpg")

Shapes: B images of S × S pixels, L patches each, D numbers a token, A components of an action, N items of a bank.

Images are paths, PIL images, uint8 arrays or tensors (S, S, 3) with channels last, batches (B, S, S, 3), or lists of
these. Files and PIL images of another size are cropped to the centred square and resized, as evaluation does; arrays
and tensors are taken as they are.

Actions are physical values by name, one mapping for all images or a list with one for each, or vectors (A,) or (B, A).
What training never drew is answered with a `UserWarning`, because the prediction extrapolates; what no action can be
(an unknown name, a flag of 0.5, a number that is not finite) is refused. Mistakes raise `iwm_fast.errors.UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.data.image_list import ImageSet
from iwm_fast.engine.checkpoint.load import default_device, is_export, is_finetuned, load_export, load_model
from iwm_fast.errors import UserError
from iwm_fast.eval.features import EncoderName, default_encoder
from iwm_fast.eval.finetune.finetuned_model import Classified, FinetunedModel, MissingMethodError, open_finetuned
from iwm_fast.eval.world_model.action_ranges import at_bound, checked_values, search_box, warn, warn_outside
from iwm_fast.eval.world_model.distances import euclidean, unit_means
from iwm_fast.eval.world_model.given_images import Images, as_pictures, read_files
from iwm_fast.eval.world_model.infer_action import search_action
from iwm_fast.models.iwm import IWM

__all__ = [
    "Action",
    "Classified",
    "FinetunedModel",
    "Images",
    "Inferred",
    "Ranking",
    "WorldModel",
    "load_world",
    "open_model",
]

# Physical values by name (what is not named is neutral; of jitter, target minus source), or vectors (A,) or (B, A).
Action = Mapping[str, float] | Sequence[Mapping[str, float]] | np.ndarray | Tensor | Sequence[float]

_OF_CLASSES = ("class_names", "classify", "logits", "segment", "tasks")


@dataclass(frozen=True)
class Ranking:
    """order: int64 (B, N), places in the bank, nearest first; distances: float64 (B, N), of each item of the bank."""

    order: NDArray[np.int64]
    distances: NDArray[np.float64]


@dataclass(frozen=True)
class Inferred:
    """The action that explains a target best: as a vector (A,) float32 and as physical values by name.

    distance: L2 over all tokens from the prediction under that action to the target; distance_neutral: the same for the
    prediction of no change. at_bound: the components that the search left at an end of what it was allowed, so that the
    true action may lie beyond it; an end that is natural (a flag's 0 and 1, a sigma of 0) does not count.
    """

    action: NDArray[np.float32]
    values: dict[str, float]
    distance: float
    distance_neutral: float
    at_bound: tuple[str, ...] = ()


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

    if not TYPE_CHECKING:  # a checker is to know that there are no such attributes

        def __getattr__(self, name: str) -> Any:
            """What a `FinetunedModel` has and this has not, in one line."""
            if name in _OF_CLASSES:
                raise MissingMethodError(f"{name}: not a finetuned result, so without classes; use iwm-fast finetune")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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

    def read(self, files: ImageSet | Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Tensor:
        """Image files as evaluation reads them: upright, the centred largest square, resized; uint8 (n, S, S, 3).

        One file, several, or images of any source from `image_list.list_images`. UserError naming the first that is
        missing, a folder, or cannot be decoded.
        """
        if isinstance(files, str | os.PathLike):
            files = [files]
        if not isinstance(files, ImageSet | list | tuple):
            files = list(files)
        return read_files(files, self.image_size)

    @torch.no_grad()
    def encode(self, images: Images, which: EncoderName | None = None) -> Tensor:
        """Tokens (B, L, D) float32 of all patches, on the model's device; their mean over L is what k-NN reads.

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

        One action for all images, or one per image. Warns where the action lies outside of what training drew.
        """
        pictures = self._pictures(images)
        rows = self.vector(action)
        if rows.ndim == 1:
            rows = np.tile(rows, (len(pictures), 1))
        if len(rows) != len(pictures):
            raise UserError(f"action has {len(rows)} rows for {len(pictures)} images: give one action, or one an image")
        actions = torch.from_numpy(rows).to(self.device)
        parts = zip(pictures.split(self._chunk), actions.split(self._chunk), strict=True)
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
        if isinstance(bank, np.ndarray) and bank.dtype.kind == "f":
            bank = torch.from_numpy(bank)
        known = isinstance(bank, Tensor) and bank.is_floating_point()
        items = bank.to(self.device).float() if known and isinstance(bank, Tensor) else self.targets(bank)
        asked = self.predict(images, action)
        if items.ndim != 3 or items.shape[1:] != asked.shape[1:] or not len(items):
            raise UserError(
                f"bank is {tuple(items.shape)}: its items are targets of shape {tuple(asked.shape[1:])}, one or more"
            )
        if not bool(items.isfinite().all()):
            raise UserError("bank has numbers that are not finite; its items are what targets gives")
        pairs = (asked.flatten(1), items.flatten(1)) if distance == "l2" else (unit_means(asked), unit_means(items))
        distances = euclidean(*pairs).cpu().numpy()
        return Ranking(np.argsort(distances, axis=1, kind="stable"), distances)

    @torch.no_grad()
    def infer(
        self, source: Images, target: Images, *, bounds: Mapping[str, tuple[float, float]] | None = None
    ) -> Inferred:
        """The action that explains one target image from one source image, by search through the predictor.

        ``bounds``: the components that are searched with their lowest and highest physical values; the others stay
        neutral. Default: the colour jitter that training drew, as far as two of its views can be apart; of external
        actions, what the manifest declares, or every choice. ``at_bound`` of the answer names the components that the
        search left at an end, and a warning says so.
        """
        pair = [self._pictures(source), self._pictures(target)]
        if any(len(one) != 1 for one in pair):
            raise UserError(f"source and target are {len(pair[0])} and {len(pair[1])} images: give one of each")
        z, wanted = self.model.encode(pair[0].to(self.device)), self.targets(pair[1])[0]

        def answer(rows: Tensor) -> Tensor:
            parts = rows.split(self._chunk)
            return torch.cat([self._answer(z.expand(len(part), -1, -1), part) for part in parts])

        neutral = answer(torch.zeros(1, self.space.dim, device=self.device))[0]
        unmoved = float((neutral - wanted).double().norm())
        if isinstance(self.space, ExternalSpace) and self.space.external.kind == "discrete":
            if bounds is not None:
                raise UserError("bounds: the actions are choices, and all of them are tried; leave bounds out")
            choices = torch.eye(self.space.dim, device=self.device)
            far = (answer(choices) - wanted).double().flatten(1).norm(dim=1)
            best = int(far.argmin())
            action = np.eye(self.space.dim, dtype=np.float32)[best]
            return Inferred(action, self._values(action), float(far[best]), unmoved)
        box = search_box(bounds, self.actions, self.space)
        found = search_action(answer, wanted, box)
        stuck = at_bound(found.action, box, self.space)
        if stuck:
            warn(f"infer ended at the end of what was searched in {', '.join(stuck)}: the action may lie beyond it")
        return Inferred(found.action, self._values(found.action), found.distance, unmoved, stuck)

    def vector(self, action: Action) -> NDArray[np.float32]:
        """An action as the predictor is given it: float32 (A,) of named values, (A,) or (B, A) of vectors.

        UserError for a name, a value or a number of values that no action has; warns outside of what training drew.
        """
        rows = self._rows(action)
        warn_outside(rows.reshape(-1, self.space.dim), self.actions, self.space)
        return rows

    def _rows(self, action: Action) -> NDArray[np.float32]:
        if isinstance(action, Mapping):
            return self.space.vector(checked_values(action, self.space))
        if isinstance(action, list | tuple) and action and all(isinstance(one, Mapping) for one in action):
            return np.stack([self._rows(one) for one in action])
        names = ", ".join(self.action_names)
        wanted = f"it has {self.space.dim} numbers ({names}), or is named values"
        try:
            rows = np.asarray(action.detach().cpu() if isinstance(action, Tensor) else action, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"action is {action!r:.60}: {wanted}") from error
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.space.dim:
            raise UserError(f"action is {rows.shape}: {wanted}")
        return rows

    def _values(self, action: NDArray[np.float32]) -> dict[str, float]:
        values = {name: float(value[0]) for name, value in self.space.decode(action[None]).items()}
        for corruption in self.space.corruptions:  # of the two that say it, the number counts, as in `vector`
            if corruption.strength is not None and corruption.done(values[corruption.strength]):
                values[corruption.name] = 1.0
        return values

    def _answer(self, z: Tensor, action: Tensor) -> Tensor:
        return self.model.predict(z, action).float()

    def _through(self, network: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        return torch.cat([network(part.to(self.device)).float() for part in pictures.split(self._chunk)])

    def _pictures(self, images: Images) -> Tensor:
        return as_pictures(images, self.image_size)


def load_world(path: Path, *, checkpoint: str = "latest", device: str | torch.device | None = None) -> WorldModel:
    """The world model of a run's folder or of an export. UserError where it is neither, or damaged.

    ``checkpoint``: of a run, latest or a name such as step_000500. ``device``: default the GPU where there is one.
    """
    place = default_device() if device is None else _device(device)
    _check(checkpoint)
    if is_export(path):
        if checkpoint != "latest":
            raise UserError(f"{path}: an export, which holds one checkpoint; leave out {checkpoint}")
        model, actions, space, step = load_export(path)
    else:
        model, config, space, step = load_model(path, checkpoint)
        actions = config.actions
    return WorldModel(model.to(place), actions, space, step=step)


def open_model(
    path: Path, *, checkpoint: str = "latest", device: str | torch.device | None = None
) -> WorldModel | FinetunedModel:
    """What a folder holds: a finetuned result, or else as `load_world`."""
    if not is_finetuned(path):
        return load_world(path, checkpoint=checkpoint, device=device)
    _check(checkpoint)
    if checkpoint != "latest":
        raise UserError(f"{path}: a finetuned result, which holds one state; leave out {checkpoint}")
    return open_finetuned(path, default_device() if device is None else _device(device))


def _check(checkpoint: object) -> None:
    if not isinstance(checkpoint, str):
        raise UserError(f"checkpoint is {checkpoint!r}: it is latest, or a name such as step_000500")


def _device(name: str | torch.device) -> torch.device:
    """UserError where torch has no such device, or sees none here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device is {name!r}: it is cpu, cuda, or cuda:1 and so on") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise UserError(f"device is {str(name)!r}: torch sees {count} GPU(s) here; iwm-fast doctor says more")
    return device
