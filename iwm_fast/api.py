"""Work with a trained world model from Python: encode, predict, rank, infer the action between two images, and plan.

A finetuned result opens the same way, and classifies or segments (`FinetunedModel`).

    world = iwm_fast.load("runs/a")
    features = world.encode("cat.jpg")
    pictures = world.read(["cat.jpg", "dog.jpg"])
    brighter = world.predict(pictures, {"brightness": 0.3})
    nearest = world.rank(pictures, {"brightness": 0.3}, bank).order[:, 0]
    world.infer(pictures[0], other).values["brightness"]

    world = iwm_fast.load("runs/car")
    world.plan("now.png", "goal.png", horizon=8).values[0]["force"]

    finetuned = iwm_fast.load("runs/a-photos")
    finetuned.classify(["cat.jpg", "dog.jpg"]).names
    finetuned.segment("street.jpg")

Shapes: B images of S × S pixels, L patches per image, D channels per token, A components of an action, N items of a
bank, H actions of a plan.

Images are paths, PIL images, uint8 arrays or tensors (S, S, 3) with channels last, batches (B, S, S, 3), or lists of
these. Files and PIL images are cropped to the centred square and resized, as in evaluation; arrays and tensors are used
as they are. A model with a history of several frames predicts from windows (B, history, S, S, 3), the oldest frame
first; an image alone stands for all of its window, as at an episode's beginning.

Actions are physical values by name, one mapping for all images or a list with one per image, or vectors (A,) or (B, A).
A value that training never sampled gives a `UserWarning`, because the prediction extrapolates; an invalid one (an
unknown name, a flag of 0.5, a number that is not finite) raises `iwm_fast.errors.UserError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig, DataConfig
from iwm_fast.data.image_list import ImageSet
from iwm_fast.data.triplets import read_triplets
from iwm_fast.engine.checkpoint.load import default_device, is_export, is_finetuned, load_export, load_model
from iwm_fast.errors import UserError
from iwm_fast.eval.features import EncoderName, default_encoder
from iwm_fast.eval.finetune.finetuned_model import Classified, FinetunedModel, MissingMethodError, open_finetuned
from iwm_fast.eval.world_model.action_ranges import at_bound, checked_values, search_box, warn, warn_outside
from iwm_fast.eval.world_model.distances import Ranking, euclidean, unit_means
from iwm_fast.eval.world_model.frames import find_triplets
from iwm_fast.eval.world_model.given_images import Images, as_pictures, as_windows, read_files
from iwm_fast.eval.world_model.infer_action import Inferred, search_action
from iwm_fast.eval.world_model.planning.cost import Distance, Score
from iwm_fast.eval.world_model.planning.plan import Plan, Settings, make_plan, require_planning
from iwm_fast.eval.world_model.planning.solvers import Method
from iwm_fast.eval.world_model.planning.state_head import StateHead, fit_state_head
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import encode_window, roll_out

__all__ = [
    "Action",
    "Classified",
    "FinetunedModel",
    "Images",
    "Inferred",
    "Plan",
    "Ranking",
    "StateHead",
    "WorldModel",
    "load_world",
    "open_model",
]

# Physical values by name (a missing name is neutral; jitter is target minus source), or vectors (A,) or (B, A).
Action = Mapping[str, float] | Sequence[Mapping[str, float]] | np.ndarray | Tensor | Sequence[float]

_OF_CLASSES = ("class_names", "classify", "logits", "segment", "tasks")


class WorldModel:
    """A trained model with its action space. No method changes its state or records gradients.

    Invalid arguments raise UserError.
    """

    def __init__(
        self,
        model: IWM,
        actions: ActionsConfig,
        space: ActionSpace,
        *,
        step: int = 0,
        chunk: int = 64,
        unread: str | None = None,
    ) -> None:
        """``chunk``: images per forward pass. ``unread``: why predictions are not fed back (`Config.unread`)."""
        self.model = model.eval()
        self.actions = actions
        self.space = space
        self.step = step
        self._chunk, self._unread = chunk, unread

    if not TYPE_CHECKING:  # a checker is to know that there are no such attributes

        def __getattr__(self, name: str) -> Any:
            """Name the `FinetunedModel` for its attributes, which this class lacks."""
            if name in _OF_CLASSES:
                raise MissingMethodError(f"{name}: not a finetuned result, so without classes; use iwm-fast finetune")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def image_size(self) -> int:
        """S, the side of the model's images in pixels."""
        return self.model.config.image

    @property
    def action_names(self) -> tuple[str, ...]:
        """The components of an action, in the vector's order."""
        return self.space.names

    @property
    def device(self) -> torch.device:
        """The device of the model and of what its methods return."""
        return next(self.model.parameters()).device

    def read(self, files: ImageSet | Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Tensor:
        """Return image files as uint8 (n, S, S, 3): upright, cropped to the centred square, resized, as in evaluation.

        ``files``: one path, several, or images of any source from `image_list.list_images`. Raises UserError with the
        first that is missing, a folder, or cannot be decoded.
        """
        if isinstance(files, str | os.PathLike):
            files = [files]
        if not isinstance(files, ImageSet | list | tuple):
            files = list(files)
        return read_files(files, self.image_size)

    @torch.no_grad()
    def encode(self, images: Images, which: EncoderName | None = None) -> Tensor:
        """Return the tokens of all patches, (B, L, D) float32 on the model's device; k-NN reads their mean over L.

        ``which``: the "context" encoder, which feeds the predictor, or the "target" encoder, whose features serve other
        tasks best; default: the target encoder where it is an EMA, else the context encoder.
        """
        chosen = default_encoder(self.model.config) if which is None else which
        if chosen not in ("target", "context"):
            raise UserError(f"which is {which!r}: give target or context")
        return self._through(lambda part: self.model.encode(part, chosen), self._pictures(images))

    @torch.no_grad()
    def targets(self, images: Images) -> Tensor:
        """Return the target tokens that predictions are compared with, (B, L, D) float32, normalised as in training."""
        return self._through(self.model.targets, self._pictures(images))

    @torch.no_grad()
    def predict(self, images: Images, action: Action) -> Tensor:
        """Return the predicted representation of the images after the action, (B, L, D) float32; compare it with
        `targets`.

        ``action``: one for all images, or one per image. Warns where it lies outside of what training sampled.
        """
        pictures = self._windows(images)
        rows = self.vector(action)
        if rows.ndim == 1:
            rows = np.tile(rows, (len(pictures), 1))
        if len(rows) != len(pictures):
            raise UserError(f"action has {len(rows)} rows for {len(pictures)} images: give one, or one per image")
        return self._rolled(pictures, rows[:, None])[:, 0]

    @torch.no_grad()
    def roll_out(self, images: Images, actions: Sequence[Action] | np.ndarray | Tensor) -> Tensor:
        """Return the predicted representation after each of T actions, (B, T, L, D) float32: each prediction is fed
        back, as the newest frame of a window that slides.

        ``actions``: T of them for all images, as in `predict`, or vectors (B, T, A). Raises UserError for more than one
        where the predictor does not read what it predicts: a frozen target, or one that kept its first weights.
        """
        pictures = self._windows(images)
        told = np.asarray(actions.detach().cpu()) if isinstance(actions, Tensor) else actions
        if isinstance(told, np.ndarray) and told.ndim == 3:
            rows = self.vector(told.reshape(-1, told.shape[2])).reshape(*told.shape[:2], self.space.dim)
        else:
            rows = self.vector(told)  # type: ignore[arg-type]  # a sequence of actions is one action per row
            rows = np.tile(rows[None], (len(pictures), 1, 1)) if rows.ndim == 2 else rows
        if rows.ndim != 3 or not rows.shape[1] or len(rows) != len(pictures):
            raise UserError(
                f"actions are {rows.shape} for {len(pictures)} images: give T actions (T, {self.space.dim}) for all of "
                f"them, or (B, T, {self.space.dim}), T at least 1"
            )
        if self._unread is not None and rows.shape[1] > 1:
            raise UserError(f"roll_out: {self._unread}: give one action")
        return self._rolled(pictures, rows)

    @torch.no_grad()
    def rank(
        self, images: Images, action: Action, bank: Images | Tensor, *, distance: Literal["l2", "cosine"] = "l2"
    ) -> Ranking:
        """Return the bank in order of distance to the prediction for each image.

        ``bank``: images, or their `targets` (N, L, D), which can be computed once for many queries. ``distance``: L2
        over all tokens, or cosine of the mean tokens (as the chord between unit vectors, which gives the same order).
        """
        if distance not in ("l2", "cosine"):
            raise UserError(f"distance is {distance!r}: give l2 or cosine")
        if isinstance(bank, np.ndarray) and bank.dtype.kind == "f":
            bank = torch.from_numpy(bank)
        known = isinstance(bank, Tensor) and bank.is_floating_point()
        items = bank.to(self.device).float() if known and isinstance(bank, Tensor) else self.targets(bank)
        asked = self.predict(images, action)
        if items.ndim != 3 or items.shape[1:] != asked.shape[1:] or not len(items):
            raise UserError(f"bank is {tuple(items.shape)}: give one or more targets of shape {tuple(asked.shape[1:])}")
        if not bool(items.isfinite().all()):
            raise UserError("bank has numbers that are not finite; give images, or what targets returns")
        pairs = (asked.flatten(1), items.flatten(1)) if distance == "l2" else (unit_means(asked), unit_means(items))
        distances = euclidean(*pairs).cpu().numpy()
        return Ranking(np.argsort(distances, axis=1, kind="stable"), distances)

    @torch.no_grad()
    def infer(
        self, source: Images, target: Images, *, bounds: Mapping[str, tuple[float, float]] | None = None
    ) -> Inferred:
        """Search for the action that leads from one source image to one target image, through the predictor.

        ``bounds``: components to search, with their lowest and highest physical value; the others stay neutral.
        Default: the range of colour jitter in training, as far as two views can differ; for external actions the
        manifest's range, or every choice. Warns where the search stops at a bound, and lists those components in
        ``at_bound``.
        """
        pair = [self._windows(source), self._pictures(target)]
        if any(len(one) != 1 for one in pair):
            raise UserError(f"source and target are {len(pair[0])} and {len(pair[1])} images: give one of each")
        z, wanted = encode_window(self.model, pair[0].to(self.device)), self.targets(pair[1])[0]

        def answer(rows: Tensor) -> Tensor:
            parts = rows.split(self._chunk)
            return torch.cat([self._answer(z.expand(len(part), -1, -1), part) for part in parts])

        neutral = answer(torch.zeros(1, self.space.dim, device=self.device))[0]
        unmoved = float((neutral - wanted).double().norm())
        if isinstance(self.space, ExternalSpace) and self.space.external.kind == "discrete":
            if bounds is not None:
                raise UserError("bounds: discrete actions have none, infer tries every choice; leave bounds out")
            choices = torch.eye(self.space.dim, device=self.device)
            far = (answer(choices) - wanted).double().flatten(1).norm(dim=1)
            best = int(far.argmin())
            action = np.eye(self.space.dim, dtype=np.float32)[best]
            return Inferred(action, self._values(action), float(far[best]), unmoved)
        box = search_box(bounds, self.actions, self.space)
        found = search_action(answer, wanted, box)
        stuck = at_bound(found.action, box, self.space)
        if stuck:
            warn(f"infer stopped at a bound of {', '.join(stuck)}: the action may lie beyond it")
        return Inferred(found.action, self._values(found.action), found.distance, unmoved, stuck)

    @torch.no_grad()
    def plan(
        self,
        frames: Images,
        goal: Images,
        *,
        horizon: int = 8,
        method: Method = "cem",
        candidates: int | None = None,
        iterations: int | None = None,
        distance: Distance = "l2",
        head: StateHead | None = None,
        score: Score = "last",
        seed: int = 0,
        start: Action | None = None,
    ) -> Plan:
        """Search for the ``horizon`` actions whose predicted end is nearest to a goal picture, for runs on triplets.

        ``frames``: one picture, or one window (1, history, S, S, 3). ``method``: cem, mppi, or gradient (Adam through
        the predictor, continuous actions only). ``candidates`` sequences per iteration, default 1,000 (gradient: 32),
        for ``iterations``, default 5 (gradient: 40). Actions stay within the run's bounds; with no more sequences of
        choices than candidates, all are tried once. ``distance`` to the goal's representation: l2 over all tokens,
        cosine of the mean tokens, or state: between what the ``head`` of `state_head` reads from both. ``score``: the
        cost is that of the last prediction, their mean, the nearest, or arrival: the last plus a tenth of the mean.
        ``start``: vectors (n, A) to search near, such as ``plan.actions[1:]`` of the plan before.

        The same ``seed`` gives the same plan on the same machine. The frames are encoded once; candidates pass the
        predictor in blocks of about 16 MiB of activations on a CPU, 1 GiB on a GPU.
        """
        settings = Settings(horizon, method, candidates, iterations, distance, score, seed)
        require_planning(self.space, settings.checked().horizon, self._unread)
        near = None if start is None else self.vector(start).reshape(-1, self.space.dim)
        return make_plan(self.model, self.space, self._windows(frames), self._pictures(goal), settings, near, head)

    def state_head(self, data: str | Path) -> StateHead:
        """Fit a head that reads the recorded state from a representation, for runs on triplets.

        ``data``: a manifest of triplets with source_state and target_state, or a folder as of `iwm-fast evaluate`; its
        test triplets come first. The head, called with `targets` of images, returns the states (B, S); its ``r2`` says
        how well each component is read in held-out episodes. Raises UserError where no states are recorded, or none can
        be read.
        """
        if not isinstance(self.space, ExternalSpace):
            raise UserError("state_head: this run was trained on images; states are recorded with triplets")
        triplets = read_triplets(find_triplets(data)[0], self.space.external)
        return fit_state_head(self.model, DataConfig(), triplets)

    def vector(self, action: Action) -> NDArray[np.float32]:
        """Return an action as the predictor's input: float32 (A,) from named values, (A,) or (B, A) from vectors.

        Raises UserError for an invalid name, value or length; warns outside of what training sampled.
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
        wanted = f"give {self.space.dim} numbers ({names}), or values by name"
        try:
            rows = np.asarray(action.detach().cpu() if isinstance(action, Tensor) else action, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"action is {action!r:.60}: {wanted}") from error
        if rows.ndim not in (1, 2) or rows.shape[-1] != self.space.dim:
            raise UserError(f"action is {rows.shape}: {wanted}")
        return rows

    def _values(self, action: NDArray[np.float32]) -> dict[str, float]:
        values = {name: float(value[0]) for name, value in self.space.decode(action[None]).items()}
        for corruption in self.space.corruptions:  # a strength also sets its flag, as in `vector`
            if corruption.strength is not None and corruption.done(values[corruption.strength]):
                values[corruption.name] = 1.0
        return values

    def _answer(self, z: Tensor, action: Tensor) -> Tensor:
        return self.model.predict(z, action).float()

    def _rolled(self, windows: Tensor, actions: NDArray[np.float32]) -> Tensor:
        """The predictions (B, T, L, D) from windows (B, H, S, S, 3), given actions (B, T, A)."""
        told = torch.from_numpy(actions).to(self.device)
        parts = zip(windows.split(self._chunk), told.split(self._chunk), strict=True)
        model = self.model
        return torch.cat([roll_out(model, encode_window(model, p.to(self.device)), a).float() for p, a in parts])

    def _through(self, network: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        return torch.cat([network(part.to(self.device)).float() for part in pictures.split(self._chunk)])

    def _pictures(self, images: Images) -> Tensor:
        return as_pictures(images, self.image_size)

    def _windows(self, images: Images) -> Tensor:
        return as_windows(images, self.image_size, self.model.config.history)


def load_world(path: Path, *, checkpoint: str = "latest", device: str | torch.device | None = None) -> WorldModel:
    """Load the world model of a run or an export. Raises UserError where the folder is neither, or damaged.

    ``checkpoint``: of a run, latest or a name such as step_000500. ``device``: default: the GPU if there is one.
    """
    place = default_device() if device is None else _device(device)
    _check(checkpoint)
    if is_export(path):
        if checkpoint != "latest":
            raise UserError(f"{path}: an export, which holds one checkpoint; leave out {checkpoint}")
        model, config, space, step = load_export(path)
    else:
        model, config, space, step = load_model(path, checkpoint)
    return WorldModel(model.to(place), config.actions, space, step=step, unread=config.unread)


def open_model(
    path: Path, *, checkpoint: str = "latest", device: str | torch.device | None = None
) -> WorldModel | FinetunedModel:
    """Load a finetuned result, or else as `load_world`."""
    if not is_finetuned(path):
        return load_world(path, checkpoint=checkpoint, device=device)
    _check(checkpoint)
    if checkpoint != "latest":
        raise UserError(f"{path}: a finetuned result, which holds one state; leave out {checkpoint}")
    return open_finetuned(path, default_device() if device is None else _device(device))


def _check(checkpoint: object) -> None:
    if not isinstance(checkpoint, str):
        raise UserError(f"checkpoint is {checkpoint!r}: give latest, or a name such as step_000500")


def _device(name: str | torch.device) -> torch.device:
    """Return the device. Raises UserError where torch has no such device here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device is {name!r}: give cpu, cuda, or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise UserError(f"device is {str(name)!r}: torch sees {count} GPU(s) here; iwm-fast doctor says more")
    return device
