"""Roll-outs: predictions fed back through the predictor, and their error at each horizon.

From a source frame the predictor predicts all patches given the first action; the prediction is its next source, with
the next action, up to the horizon. A model with a history of several frames reads them in a window that slides: the
prediction is its newest frame, the oldest is left out. The error at h is the mean squared difference, over tokens and
channels, of the prediction from the target representation of the frame after h actions, in the unit of the loss.
Controls: ``copy`` is the target representation of the frame that the first action follows; ``shuffled`` is the model
given another roll-out's actions. Training covers the first `train.horizon` steps.

The predictor must read what it predicts: a frozen target has another space than the encoder, so there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.data.triplet_windows import followers, windows
from iwm_fast.data.triplets import Triplets
from iwm_fast.eval.features import device_of, evaluating
from iwm_fast.eval.stats import bootstrap_interval, evenly_spaced
from iwm_fast.eval.world_model.frames import FrameReader
from iwm_fast.eval.world_model.rollout_states import StateReader
from iwm_fast.models.iwm import IWM
from iwm_fast.models.window import encode_window, roll_out

if TYPE_CHECKING:
    from iwm_fast.eval.world_model.triplet_subject import TripletSubject

__all__ = ["ROLLOUT_LINES", "chains", "evaluate_rollouts", "measure_rollouts", "rollout_errors"]

ROLLOUT_LINES = ("model", "shuffled", "copy")
STARTS = 128


def chains(triplets: Triplets, horizon: int) -> NDArray[np.int64]:
    """Return rows of consecutive triplets (`triplet_windows.followers`), int64 (n, horizon)."""
    follows = followers(triplets)
    rows = np.arange(len(triplets))[:, None]
    for _ in range(horizon - 1):
        rows = np.concatenate([rows, follows[rows[:, -1:]]], axis=1)
        rows = rows[rows[:, -1] >= 0]
    return rows


def rollout_errors(
    model: IWM, frames: Tensor, actions: Tensor, *, chunk: int = 16, states: StateReader | None = None
) -> dict[str, NDArray[np.float64]]:
    """Return mean squared errors (n, T) of n roll-outs, by line; ``states`` is given them as well.

    frames: uint8 (n, H + T, S, S, 3), the H frames of the first source, the oldest first, and the true ones; actions:
    float32 (n, T, A). At least two roll-outs, so that actions can be shuffled. The model's mode is unchanged.
    """
    device = device_of(model)
    lines: dict[str, list[Tensor]] = {name: [] for name in ROLLOUT_LINES}
    others = torch.roll(actions, -1, dims=0)
    history = frames.shape[1] - actions.shape[1]
    with evaluating(model):
        for rows in torch.arange(len(frames)).split(chunk):
            seen = frames[rows].to(device)
            last = seen[:, history - 1 :]
            truth = model.targets(last.flatten(0, 1)).float().unflatten(0, last.shape[:2])  # (b, T + 1, L, D)
            start = encode_window(model, seen[:, :history])
            lines["copy"].append(_errors(truth[:, :1], truth))
            for name, told in (("model", actions), ("shuffled", others)):
                predictions = roll_out(model, start, told[rows].to(device)).float()
                lines[name].append(_errors(predictions, truth))
                if name == "model" and states is not None:
                    states.add(rows.numpy(), truth[:, 1:], predictions)
    return {name: torch.cat(parts).numpy() for name, parts in lines.items()}


def _errors(answers: Tensor, truth: Tensor) -> Tensor:
    """Return (b, T) float64 on the CPU: predictions (b, T or 1, L, D) against truth (b, T + 1, L, D)[:, 1:]."""
    return (answers - truth[:, 1:]).double().square().mean(dim=(2, 3)).cpu()


def evaluate_rollouts(subject: TripletSubject) -> dict[str, Any]:
    """Return roll-outs of ``eval.horizon`` steps under ``rollout``, or why there are none."""
    if subject.config.model.target == "frozen":
        return {"not_run": {"rollout": subject.config.unread}}
    horizon = subject.config.eval.horizon
    history, tell = subject.config.model.history, subject.tell("roll-outs")
    found = measure_rollouts(subject.model, subject.reader, horizon, history=history, progress=tell)
    return {"not_run": {"rollout": found["reason"]}} if "reason" in found else {"rollout": found}


def measure_rollouts(
    model: IWM,
    reader: FrameReader,
    horizon: int,
    *,
    history: int = 1,
    starts: int = STARTS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return {horizons, starts, and for each line its mean (H,), its interval (H, 2)}; or {reason} without chains.

    Where episodes with states are recorded, also {state_r2: as `StateReader.result`}. Roll-outs begin at chains spread
    evenly over the set; intervals are by bootstrap over roll-outs.
    """
    found = chains(reader.triplets, horizon)
    rows = found[evenly_spaced(starts, len(found))]
    if len(rows) < 2:
        return {"reason": f"the set has fewer than two chains of {horizon} consecutive triplets"}
    places = np.concatenate([windows(reader.triplets, history)[rows[:, 0]], reader.triplets.target[rows]], axis=1)
    pictures, good = reader.read(places.reshape(-1))
    whole = good.reshape(places.shape).all(axis=1)
    if whole.sum() < 2:
        return {"reason": f"fewer than two chains of {horizon} triplets can be decoded"}
    frames = pictures.unflatten(0, places.shape)[torch.from_numpy(whole)]
    vectors = torch.from_numpy(reader.triplets.vectors()[rows[whole]])
    with evaluating(model):  # as the roll-outs that the heads read: a target in fp8 is so in training mode alone
        states = StateReader.of(model, reader.data, reader.triplets, rows[whole])
    errors = rollout_errors(model, frames, vectors, states=states)
    if progress is not None:
        progress(len(frames), len(frames))
    out: dict[str, Any] = {"horizons": list(range(1, horizon + 1)), "starts": len(frames)}
    if states is not None:
        out["state_r2"] = states.result()
    for name, values in errors.items():
        out[name] = values.mean(axis=0).tolist()
        out[f"{name}_interval"] = [list(bootstrap_interval(column)) for column in values.T]
    return out
