"""Packed batches: the tokens of B images lie one after another in one (N, D) tensor; `Segments` holds their bounds.

Lengths are known on the host (masks are sampled there), so nothing here waits for a device. Derived tensors are
computed once per batch, on first use, and cached.

Static shapes: segments of padding may follow those of the images, so that N is the same for many batches. They belong
to no image, nothing attends to them, and their tokens have no loss, so every gradient through them is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from iwm_fast.kernels.permutation import invert

__all__ = ["Segments", "SortedSegments", "held_segments", "interleave", "pack", "to_device"]

Derived = TypeVar("Derived")
# Sizes that `Segments.uniform` remembers: rollouts of a batch's remaining samples may ask for any number of images.
_RECENT = 64


def _cached(derive: Callable[[Segments], Derived]) -> cached_property[Derived]:
    """As `cached_property`, outside inference mode: the first to ask may be an evaluation, the next a training."""

    @wraps(derive)
    def derived(segments: Segments) -> Derived:
        with torch.inference_mode(False):
            return derive(segments)

    return cached_property(derived)


@dataclass(frozen=True, eq=False)
class Segments:
    """The bounds of each image's tokens among N packed tokens.

    lengths: tokens of each of the B images, on the host, zeros allowed; then those of the segments of padding.
    cu_seqlens: int32 (B + padding + 1,), their running sum from 0, on the device. padding: the number of segments of
    padding. ceiling: an upper bound of the lengths of all batches of the same N; None: only these lengths are known.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    padding: int = 0
    ceiling: int | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | np.ndarray,
        device: torch.device | str = "cpu",
        padding: int = 0,
        ceiling: int | None = None,
    ) -> Segments:
        """Return segments of these lengths, the last `padding` of them padding."""
        host = np.asarray(lengths, dtype=np.int64)
        if host.ndim != 1 or (host < 0).any():
            raise ValueError(f"lengths must be one row of numbers of tokens, none negative; found shape {host.shape}")
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(host)])
        return cls(tuple(host.tolist()), to_device(bounds.astype(np.int32), device), padding, ceiling)

    @staticmethod
    def uniform(images: int, length: int, device: torch.device | str = "cpu") -> Segments:
        """Return segments of `images` images of `length` tokens each; those of recent sizes are cached."""
        found = _uniform(images, length, torch.device(device))
        if _held is not None:
            _held.add(found)
        return found

    @property
    def device(self) -> torch.device:
        """The device of the index tensors."""
        return self.cu_seqlens.device

    @cached_property
    def equal(self) -> bool:
        """Whether all images have the same number of tokens."""
        return len(set(self.lengths)) < 2

    @cached_property
    def total(self) -> int:
        """N, the tokens of all segments."""
        return sum(self.lengths)

    @cached_property
    def filled(self) -> int:
        """The number of segments with a token, which each block's attention needs."""
        return sum(1 for n in self.lengths if n)

    @property
    def images(self) -> int:
        """B, the segments that are no padding."""
        return len(self.lengths) - self.padding

    @property
    def real(self) -> int:
        """The tokens of images, which precede those of padding."""
        return sum(self.lengths[: self.images])

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (B,): the row of each image's first token, on the host."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return np.cumsum(lengths) - lengths

    @property
    def longest(self) -> int:
        """The longest length that attention kernels are launched for: the ceiling, or the longest here."""
        return max(self.lengths, default=0) if self.ceiling is None else self.ceiling

    @_cached
    def filled_bounds(self) -> Tensor:
        """cu_seqlens of the images that have a token, int32, on the device."""
        if 0 not in self.lengths:
            return self.cu_seqlens
        return Segments.from_lengths([n for n in self.lengths if n], self.device).cu_seqlens

    @_cached
    def image_of_token(self) -> Tensor:
        """int64 (N,): the image that each token belongs to; of padding, B or more."""
        return torch.repeat_interleave(self.cu_seqlens.long().diff(), output_size=self.total)

    @_cached
    def pixels_of_token(self) -> Tensor:
        """int64 (N,): the image whose pixels make each token: its own, or for padding the last one."""
        return self.image_of_token.clamp(max=self.images - 1) if self.padding else self.image_of_token

    def joined(self, frames: int) -> Segments:
        """Return the segments of images of `frames` neighbours each; those of padding stay as they are."""
        if frames == 1:
            return self
        if self.images % frames:
            raise ValueError(f"there are {self.images} segments; they must be a multiple of {frames} frames per image")
        lengths = np.asarray(self.lengths[: self.images], np.int64).reshape(-1, frames).sum(axis=1).tolist()
        # From the bounds on the device: a CUDA graph can read other batches' bounds.
        bounds = torch.cat([self.cu_seqlens[: self.images : frames], self.cu_seqlens[self.images :]])
        return Segments(
            (*lengths, *self.lengths[self.images :]),
            bounds,
            self.padding,
            None if self.ceiling is None else self.ceiling * frames,
        )

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(images, length) of each run of neighbouring images with the same length."""
        runs: list[tuple[int, int]] = []
        for length in self.lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        return tuple(runs)

    @cached_property
    def is_sorted(self) -> bool:
        """Whether images of the same length are neighbours because lengths never fall."""
        return all(a <= b for a, b in zip(self.lengths, self.lengths[1:], strict=False))

    @_cached
    def by_length(self) -> SortedSegments:
        """The same images in ascending order of length."""
        image_order = np.argsort(np.asarray(self.lengths, dtype=np.int64), kind="stable")
        ordered = Segments.from_lengths(
            np.asarray(self.lengths, dtype=np.int64)[image_order], self.device, ceiling=self.ceiling
        )
        order_device = to_device(image_order, self.device)
        shift = to_device(self.starts[image_order] - ordered.starts, self.device)
        order = torch.arange(self.total, device=self.device) + shift[ordered.image_of_token]
        return SortedSegments(ordered, order_device, order, invert(order))

    @_cached
    def block_diagonal_mask(self) -> Any:
        """The mask of these segments for xformers. Images without a token have no block.

        With a ceiling, kernels are launched for that and read the bounds in place: both are the same for every batch of
        these sizes, as a CUDA graph needs.
        """
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

        if self.ceiling is None or 0 in self.lengths:
            return BlockDiagonalMask.from_seqlens([n for n in self.lengths if n], device=self.device)
        starts = [0, *np.cumsum(self.lengths).tolist()]
        info = _SeqLenInfo(
            seqstart=self.cu_seqlens, max_seqlen=self.ceiling, min_seqlen=min(self.lengths), seqstart_py=starts
        )
        return BlockDiagonalMask(q_seqinfo=info, k_seqinfo=info)


@dataclass(frozen=True, eq=False)
class SortedSegments:
    """Segments in ascending order of length, with the permutation and its inverse.

    image_order: int64 (B,), the image at each place; token_order: int64 (N,), the token; token_rank: its inverse.
    """

    segments: Segments
    image_order: Tensor
    token_order: Tensor
    token_rank: Tensor


_alive: WeakValueDictionary[tuple[int, int, torch.device], Segments] = WeakValueDictionary()
_held: set[Segments] | None = None


@lru_cache(maxsize=_RECENT)
def _uniform(images: int, length: int, device: torch.device) -> Segments:
    found = _alive.get((images, length, device))
    if found is None:
        with torch.inference_mode(False):
            found = Segments.from_lengths((length,) * images, device, ceiling=length)
        _alive[images, length, device] = found
    return found


@contextmanager
def held_segments(held: set[Segments]) -> Iterator[None]:
    """Inside, add to `held` what `Segments.uniform` returns: a CUDA graph reads them in place as long as it exists."""
    global _held  # noqa: PLW0603  (read wherever a network is computed)
    before, _held = _held, held
    try:
        yield
    finally:
        _held = before


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Copy a host array to the device without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(
    patches: np.ndarray,
    lengths: np.ndarray,
    device: torch.device | str = "cpu",
    padding: Sequence[int] | np.ndarray = (),
    ceiling: int | None = None,
) -> tuple[Tensor, Segments]:
    """Return patches int64 (N,) and their segments on the device, from images' patches and lengths on the host.

    padding: lengths of the segments of padding that follow, whose patches count from 0. ceiling: as in `Segments`.
    """
    segments = Segments.from_lengths(np.concatenate([lengths, padding]).astype(np.int64), device, len(padding), ceiling)
    return to_device(np.concatenate([patches, *(np.arange(n) for n in padding)]).astype(np.int64), device), segments


def interleave(parts: Sequence[Segments]) -> tuple[Segments, list[Tensor]]:
    """Concatenate several packed sets image by image: each image's tokens of the first part, then of the second, and so
    on. A part without padding has tokens for the others' segments of padding too.

    Returns the segments and, for each part, int64 (N_part,): the row of each of its tokens in the result.
    """
    # From the bounds on the device: no copy, and a CUDA graph can read other batches' bounds.
    bounds = torch.stack([part.cu_seqlens for part in parts]).long()  # (parts, B + 1)
    lengths = tuple(sum(of_image) for of_image in zip(*(part.lengths for part in parts), strict=True))
    ceilings = [part.ceiling for part in parts]
    joined = Segments(
        lengths,
        bounds.sum(dim=0).to(torch.int32),
        max(part.padding for part in parts),
        None if None in ceilings else sum(n for n in ceilings if n is not None),
    )
    # A token of part p follows all earlier images, and its own image's tokens of earlier parts.
    before = bounds[:, :-1].sum(dim=0) - bounds[:, :-1] + bounds.diff(dim=1).cumsum(dim=0) - bounds.diff(dim=1)
    return joined, [
        torch.arange(part.total, device=part.device) + shift[part.image_of_token]
        for part, shift in zip(parts, before, strict=True)
    ]
