"""Windows of frames in representation space: what a world model with `model.history` frames predicts from.

Shapes: B sources of H frames (`model.history`), the oldest first; L patches per frame, D channels, A components of an
action. Each frame is encoded by itself, so a prediction, which is one frame, can follow the encoded ones: roll-outs
slide the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["World", "encode_window", "predictions", "roll_out", "slide"]


class World(Protocol):
    """What roll-outs need of a model; `models.iwm.IWM` has it."""

    def encode(self, images: Tensor) -> Tensor:
        """Return the context encoder's tokens of uint8 (B, S, S, 3): (B, L, D)."""

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the next frame's tokens (B, L, D) from a window z (B, H · L, D), given the action (B, A)."""


def encode_window(model: World, frames: Tensor) -> Tensor:
    """Return the context encoder's tokens of uint8 (B, H, S, S, 3) as a window: (B, H · L, D)."""
    return model.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).flatten(1, 2)


def slide(z: Tensor, prediction: Tensor) -> Tensor:
    """Return the window z (B, H · L, D) without its oldest frame, with the predicted one (B, L, D) as the newest."""
    return torch.cat([z[:, prediction.shape[1] :], prediction.to(z.dtype)], dim=1)


def predictions(model: World, z: Tensor, actions: Tensor) -> Iterator[Tensor]:
    """Yield the T predictions (B, L, D) from a window z (B, H · L, D), each fed back with the next action.

    actions: (B, T, A). A window of one frame, (B, L, D), is that of a model with one frame.
    """
    prediction = None
    for action in actions.unbind(dim=1):
        if prediction is not None:  # never after the last: a frozen target's space may have another width
            z = slide(z, prediction)
        prediction = model.predict(z, action)
        yield prediction


def roll_out(model: World, z: Tensor, actions: Tensor) -> Tensor:
    """Return the `predictions` as one tensor, (B, T, L, D)."""
    return torch.stack(list(predictions(model, z, actions)), dim=1)
