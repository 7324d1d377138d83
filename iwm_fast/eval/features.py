"""Frozen features: the mean over an image's tokens, of one or several models in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from iwm_fast.config import ModelConfig
from iwm_fast.models.iwm import IWM

__all__ = ["EncoderName", "default_encoder", "device_of", "evaluating", "pooled_features", "row_chunks"]

EncoderName = Literal["target", "context"]


def default_encoder(model: ModelConfig) -> EncoderName:
    """The encoder that probes read: the moving average where there is one (as in DINO), else the only one."""
    return "target" if model.target == "ema" else "context"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd; each model's own mode is put back afterwards."""
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)


def row_chunks(batches: Tensor | Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """The rows of one tensor, or of several in turn, in pieces of at most ``chunk``."""
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        yield from batch.split(chunk)


def pooled_features(
    models: Sequence[IWM], batches: Tensor | Iterable[Tensor], *, which: EncoderName, chunk: int = 128
) -> list[Tensor]:
    """Mean-pooled tokens (n, D), float32 on the CPU, for each model, of clean uint8 images (b, S, S, 3).

    Each image is read once, whatever the number of models: decoding is often the dearer part.
    """
    rows: list[list[Tensor]] = [[] for _ in models]
    with evaluating(*models):
        for images in row_chunks(batches, chunk):
            for model, out in zip(models, rows, strict=True):
                tokens = model.encode(images.to(device_of(model)), which)  # (b, L, D)
                out.append(tokens.float().mean(dim=1).cpu())
    if not rows or not rows[0]:
        raise ValueError("batches holds no image; at least one is needed")
    return [torch.cat(out) for out in rows]
