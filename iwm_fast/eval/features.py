"""Frozen features of clean images: mean token or all tokens, of one or several encoders in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from iwm_fast.config import ModelConfig
from iwm_fast.eval.feature_cache import FeatureCache, Features, Room, weights_digest
from iwm_fast.eval.splits import Split
from iwm_fast.models.iwm import IWM
from iwm_fast.models.vit import VisionTransformer

__all__ = [
    "POOLING",
    "EncoderName",
    "Kept",
    "announce",
    "bypass_encoder",
    "default_encoder",
    "device_of",
    "encoder_of",
    "evaluating",
    "pooled_features",
    "read_features",
    "row_chunks",
]

EncoderName = Literal["target", "context"]
# pooled: the mean token, float32 (n, D). tokens: all of them, float16 (n, L, D): they are layer-normalised, so near 1,
# where half precision has three digits. pixels: the clean views themselves, uint8 (n, S, S, 3).
Kept = Literal["pooled", "tokens", "pixels"]
_Array = tuple[tuple[int, ...], DTypeLike]
POOLING = "mean of all tokens"  # how "pooled" is called in results
_CHUNK = 128
_SAID = {"pooled": "mean tokens", "tokens": "tokens in half precision", "pixels": "decoded images"}
_WORTH_A_LINE = 100e6  # bytes of mean tokens; tokens and images always are


def default_encoder(model: ModelConfig) -> EncoderName:
    """Return the encoder that probes read: the EMA if there is one (as in DINO), else the context encoder."""
    return model.evaluated_encoder


def bypass_encoder(model: ModelConfig) -> EncoderName:
    """Return the encoder of a source without a predictor, a control: the one in whose space predictions lie, and the
    context encoder where an EMA makes both spaces one.
    """
    return "target" if model.target == "frozen" else "context"


def encoder_of(model: IWM, which: EncoderName) -> VisionTransformer:
    """Return the module that ``which`` names; with a shared target both names mean the same one."""
    return model.encoder if which == "context" or model.target_encoder is None else model.target_encoder


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set evaluation mode without autograd; restore each model's own mode afterwards."""
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
    """Yield the rows of one tensor, or of several in turn, in pieces of at most ``chunk``."""
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        yield from batch.split(chunk)


def pooled_features(
    models: Sequence[IWM], batches: Tensor | Iterable[Tensor], *, which: EncoderName, chunk: int = _CHUNK
) -> list[Tensor]:
    """Return mean-pooled tokens (n, D), float32 on the CPU, for each model, of clean uint8 images (b, S, S, 3).

    Each image is read once for all models: decoding is often the slower part.
    """
    rows: list[list[Tensor]] = [[] for _ in models]
    with evaluating(*models):
        for images in row_chunks(batches, chunk):
            for model, out in zip(models, rows, strict=True):
                out.append(torch.from_numpy(_keep(encoder_of(model, which), images, "pooled")))
    if not rows or not rows[0]:
        raise ValueError("batches has no image; at least one is needed")
    return [torch.cat(out) for out in rows]


def read_features(
    encoders: Sequence[VisionTransformer],
    split: Split,
    keep: Kept,
    *,
    cache: FeatureCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Features]:
    """Return the features of ``split`` for each encoder; images are read once, and not at all if all is cached.

    ``progress`` is called with (images done, images). Without ``cache`` the result is in memory. ``split.bad`` lists
    what was left out either way. Raise UserError as ``split.read``.
    """
    keys = [_key(encoder, split, keep) for encoder in encoders] if cache is not None else [{} for _ in encoders]
    found = [cache.find(key) if cache is not None else None for key in keys]
    missing = [place for place, features in enumerate(found) if features is None]
    for features in found:
        if features is not None:
            split.accept(features.left_out, features.labels)
    if missing:
        with ExitStack() as stack:
            rooms = [stack.enter_context(_room(cache, keys[i], encoders[i], split, keep)) for i in missing]
            _fill(rooms, [encoders[i] for i in missing], split, keep, progress)
        for place, room in zip(missing, rooms, strict=True):
            published = cache.find(keys[place]) if cache is not None and room.kept else None
            found[place] = published if published is not None else room.features()
    return [features for features in found if features is not None]


def announce(
    encoders: Sequence[VisionTransformer], splits: Sequence[Split], keep: Kept, cache: FeatureCache | None
) -> None:
    """Say in one line what `read_features` of these will write into the cache; nothing if it has all of it.

    Raise CannotRunError if neither the disk nor the memory has room.
    """
    if cache is None:
        return
    every = [(encoder, split) for split in splits for encoder in encoders]
    if keep == "pooled" and sum(_bytes(*one, keep) for one in every) < _WORTH_A_LINE:
        return
    needed = sum(_bytes(*one, keep) for one in every if cache.find(_key(*one, keep)) is None)
    if needed:
        cache.announce(_SAID[keep], needed)


def _fill(
    rooms: Sequence[Room],
    encoders: Sequence[VisionTransformer],
    split: Split,
    keep: Kept,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    with evaluating(*encoders):
        for images, labels in split.read():
            for first in range(0, len(images), _CHUNK):
                part = images[first : first + _CHUNK]
                for room, encoder in zip(rooms, encoders, strict=True):
                    room.add(_keep(encoder, part, keep), labels[first : first + _CHUNK])
            done += len(images)
            if progress is not None:
                progress(done, len(split))
    for room in rooms:
        room.left_out = dict(split.bad)
    if progress is not None and done < len(split):
        progress(len(split), len(split))


def _keep(encoder: VisionTransformer, images: Tensor, keep: Kept) -> NDArray[Any]:
    if keep == "pixels":
        pixels: NDArray[Any] = images.cpu().numpy()
        return pixels
    tokens = encoder(images.to(device_of(encoder))).unflatten(0, (len(images), -1))  # (b, L, D)
    kept: NDArray[Any] = (tokens.float().mean(dim=1) if keep == "pooled" else tokens.half()).cpu().numpy()
    return kept


@contextmanager
def _room(
    cache: FeatureCache | None, key: dict[str, Any], encoder: VisionTransformer, split: Split, keep: Kept
) -> Iterator[Room]:
    values, labels = _arrays(encoder, split, keep)
    if cache is None:
        yield Room(np.empty(*values), np.empty(*labels))
        return
    with cache.filling(key, values, labels) as room:
        yield room


def _arrays(encoder: VisionTransformer, split: Split, keep: Kept) -> tuple[_Array, _Array]:
    """Return shape and dtype of the features and of the labels."""
    shape: tuple[int, ...]
    kind: DTypeLike
    shape, kind = {
        "pooled": ((encoder.width,), np.float32),
        "tokens": ((encoder.patches, encoder.width), np.float16),
        "pixels": ((encoder.image, encoder.image, 3), np.uint8),
    }[keep]
    labels = ((len(split), *split.label_shape), np.uint8 if split.label_shape else np.int64)
    return ((len(split), *shape), kind), labels


def _bytes(encoder: VisionTransformer, split: Split, keep: Kept) -> int:
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in _arrays(encoder, split, keep))


def _key(encoder: VisionTransformer, split: Split, keep: Kept) -> dict[str, Any]:
    """Return everything that the features depend on. Weights show not all of the architecture, neither heads nor the
    rotation's base; pixels need none.
    """
    own = encoder.architecture
    shape = [own.image, own.patch, own.shape.heads, own.positions, own.norm_eps, own.rope_base]
    weights = None if keep == "pixels" else weights_digest(encoder)
    return {"keep": keep, "encoder": shape, "weights": weights, "images": split.fingerprint()}
