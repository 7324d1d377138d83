"""Packed batches: the tokens of B images lie one after another in one (N, D) tensor; `Segments` says where each ends.

Lengths are known on the host (masks are drawn there), so nothing here waits for a device. Everything derived is made
once a batch, on first use, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.kernels.permutation import invert

__all__ = ["Segments", "SortedSegments", "interleave", "to_device"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each image's tokens lie among N packed tokens.

    lengths: tokens of each of the B images, on the host; may hold zeros.
    cu_seqlens: int32 (B + 1,), their running sum from 0, on the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Segments:
        """Segments of images with so many tokens each."""
        host = np.asarray(lengths, dtype=np.int64)
        if host.ndim != 1 or (host < 0).any():
            raise ValueError(f"lengths must be one row of numbers of tokens, none negative; found shape {host.shape}")
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(host)])
        return cls(tuple(host.tolist()), to_device(bounds.astype(np.int32), device))

    @staticmethod
    def uniform(images: int, length: int, device: torch.device | str = "cpu") -> Segments:
        """Segments of `images` images that all have `length` tokens, made once for each such batch."""
        return _uniform(images, length, torch.device(device))

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.cu_seqlens.device

    @cached_property
    def total(self) -> int:
        """N, the tokens of all images."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (B,): the row of each image's first token, on the host."""
        lengths = np.asarray(self.lengths, dtype=np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def image_of_token(self) -> Tensor:
        """int64 (N,): the image that each token belongs to."""
        return torch.repeat_interleave(self.cu_seqlens.long().diff(), output_size=self.total)

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

    @cached_property
    def by_length(self) -> SortedSegments:
        """The same images in ascending order of length."""
        image_order = np.argsort(np.asarray(self.lengths, dtype=np.int64), kind="stable")
        ordered = Segments.from_lengths(np.asarray(self.lengths, dtype=np.int64)[image_order], self.device)
        order_device = to_device(image_order, self.device)
        shift = to_device(self.starts[image_order] - ordered.starts, self.device)
        order = torch.arange(self.total, device=self.device) + shift[ordered.image_of_token]
        return SortedSegments(ordered, order_device, order, invert(order))

    @cached_property
    def block_diagonal_mask(self) -> Any:
        """The mask of these segments for xformers. Images without a token have no block."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens([n for n in self.lengths if n], device=self.device)


@dataclass(frozen=True, eq=False)
class SortedSegments:
    """Segments in ascending order of length, and the way there and back.

    image_order: int64 (B,), which image stands at each place; token_order: int64 (N,), which token;
    token_rank: its inverse, the place of each token.
    """

    segments: Segments
    image_order: Tensor
    token_order: Tensor
    token_rank: Tensor


@lru_cache(maxsize=16)
def _uniform(images: int, length: int, device: torch.device) -> Segments:
    return Segments.from_lengths((length,) * images, device)


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """A host array on the device; nothing waits for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def interleave(parts: Sequence[Segments]) -> tuple[Segments, list[Tensor]]:
    """Join several packed sets image by image: each image's tokens of the first part, then of the second, and so on.

    Returns the joined segments and, for each part, int64 (N_part,): the row in the joined set of each of its tokens.
    """
    lengths = np.asarray([part.lengths for part in parts], dtype=np.int64).reshape(len(parts), -1)
    joined = Segments.from_lengths(lengths.sum(axis=0), parts[0].device)
    before = np.cumsum(lengths, axis=0) - lengths  # (parts, B): tokens of the same image in earlier parts
    places = []
    for part, earlier in zip(parts, before, strict=True):
        shift = to_device(joined.starts + earlier - part.starts, part.device)
        places.append(torch.arange(part.total, device=part.device) + shift[part.image_of_token])
    return joined, places
