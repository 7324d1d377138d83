"""Roll-outs: predictions fed back through the predictor, and their error at each horizon.

From a source frame the predictor predicts all patches given the first action; the prediction is its next source, with
the next action, up to the horizon. The error at h is the mean squared difference, over tokens and channels, of the
prediction from the target representation of the frame after h actions, in the unit of the loss. Controls: ``copy`` is
the target representation of the first frame; ``shuffled`` is the model given another roll-out's actions. Training
covers h = 1 only.

The predictor must read what it predicts: a frozen target has another space than the encoder, so there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.data.triplets import Triplets
from iwm_fast.eval.features import device_of, evaluating
from iwm_fast.eval.stats import bootstrap_interval, evenly_spaced
from iwm_fast.eval.world_model.frames import FrameReader
from iwm_fast.models.iwm import IWM

if TYPE_CHECKING:
    from iwm_fast.eval.world_model.triplet_subject import TripletSubject

__all__ = ["ROLLOUT_LINES", "chains", "evaluate_rollouts", "measure_rollouts", "rollout_errors"]

ROLLOUT_LINES = ("model", "shuffled", "copy")
STARTS = 128


def chains(triplets: Triplets, horizon: int) -> NDArray[np.int64]:
    """Return rows of consecutive triplets, int64 (n, horizon): each one's target file is the next one's source.

    They are of one episode and of successive steps, if the manifest has these. A chain ends if several triplets could
    be the next.
    """
    nothing = np.zeros(len(triplets), np.int64)
    episode = nothing if triplets.episode is None else triplets.episode
    step, one = (nothing, 0) if triplets.step is None else (triplets.step, 1)
    begins: dict[tuple[int, int, int], int] = {}
    for row, key in enumerate(zip(episode.tolist(), step.tolist(), triplets.source.tolist(), strict=True)):
        begins[key] = -1 if key in begins else row
    ends = zip(episode.tolist(), (step + one).tolist(), triplets.target.tolist(), strict=True)
    follows = np.array([begins.get(key, -1) for key in ends], np.int64)
    rows = np.arange(len(triplets))[:, None]
    for _ in range(horizon - 1):
        rows = np.concatenate([rows, follows[rows[:, -1:]]], axis=1)
        rows = rows[rows[:, -1] >= 0]
    return rows


def rollout_errors(model: IWM, frames: Tensor, actions: Tensor, *, chunk: int = 16) -> dict[str, NDArray[np.float64]]:
    """Return mean squared errors (n, H) of n roll-outs, by line.

    frames: uint8 (n, H + 1, S, S, 3), the first frame and the true ones; actions: float32 (n, H, A). At least two
    roll-outs, so that actions can be shuffled. The model's mode is unchanged.
    """
    device = device_of(model)
    lines: dict[str, list[Tensor]] = {name: [] for name in ROLLOUT_LINES}
    others = torch.roll(actions, -1, dims=0)
    with evaluating(model):
        for rows in torch.arange(len(frames)).split(chunk):
            seen = frames[rows].to(device)
            truth = model.targets(seen.flatten(0, 1)).float().unflatten(0, seen.shape[:2])  # (b, H + 1, L, D)
            start = model.encode(seen[:, 0], "context")
            lines["copy"].append(_errors(truth[:, :1], truth))
            for name, told in (("model", actions), ("shuffled", others)):
                z, answers = start, []
                for step in range(actions.shape[1]):
                    z = model.predict(z, told[rows, step].to(device))
                    answers.append(z.float())
                lines[name].append(_errors(torch.stack(answers, dim=1), truth))
    return {name: torch.cat(parts).numpy() for name, parts in lines.items()}


def _errors(answers: Tensor, truth: Tensor) -> Tensor:
    """Return (b, H) float64 on the CPU: predictions (b, H or 1, L, D) against truth (b, H + 1, L, D)[:, 1:]."""
    return (answers - truth[:, 1:]).double().square().mean(dim=(2, 3)).cpu()


def evaluate_rollouts(subject: TripletSubject) -> dict[str, Any]:
    """Return roll-outs of ``eval.horizon`` steps under ``rollout``, or why there are none."""
    if subject.config.model.target == "frozen":
        reason = "predictions are in the frozen target's space, and the predictor reads the encoder's"
        return {"not_run": {"rollout": reason}}
    horizon = subject.config.eval.horizon
    found = measure_rollouts(subject.model, subject.reader, horizon, progress=subject.tell("roll-outs"))
    return {"not_run": {"rollout": found["reason"]}} if "reason" in found else {"rollout": found}


def measure_rollouts(
    model: IWM,
    reader: FrameReader,
    horizon: int,
    *,
    starts: int = STARTS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return {horizons, starts, and for each line its mean (H,), its interval (H, 2)}; or {reason} without chains.

    Roll-outs begin at chains spread evenly over the set; intervals are by bootstrap over roll-outs.
    """
    found = chains(reader.triplets, horizon)
    rows = found[evenly_spaced(starts, len(found))]
    if len(rows) < 2:
        return {"reason": f"the set has fewer than two chains of {horizon} consecutive triplets"}
    places = np.concatenate([reader.triplets.source[rows[:, :1]], reader.triplets.target[rows]], axis=1)
    pictures, good = reader.read(places.reshape(-1))
    whole = good.reshape(places.shape).all(axis=1)
    if whole.sum() < 2:
        return {"reason": f"fewer than two chains of {horizon} triplets can be decoded"}
    frames = pictures.unflatten(0, places.shape)[torch.from_numpy(whole)]
    vectors = torch.from_numpy(reader.triplets.vectors()[rows[whole]])
    errors = rollout_errors(model, frames, vectors)
    if progress is not None:
        progress(len(frames), len(frames))
    out: dict[str, Any] = {"horizons": list(range(1, horizon + 1)), "starts": len(frames)}
    for name, values in errors.items():
        out[name] = values.mean(axis=0).tolist()
        out[f"{name}_interval"] = [list(bootstrap_interval(column)) for column in values.T]
    return out
