"""Decompose the energy of the target's tokens into mean, position, image and rest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SHARES", "energy_shares"]

SHARES = ("energy_mean", "energy_position", "energy_image", "energy_rest")


def energy_shares(tokens: Tensor, places: Tensor, patches: int) -> dict[str, float]:
    """Return the shares of Σ‖z‖² over tokens (T, D), which add up to 1, by the names in `SHARES`.

    places: int64 (T,), image · patches + patch of each token. patches: L of an image.

    A two-way analysis of variance, z = mean + position + image + rest: the sums of squares of the positions' and of the
    images' means, minus their expectation from the rest alone (their degrees of freedom times its variance; method of
    moments: Searle, Casella and McCulloch, Variance Components, 1992), and at least 0. Exact for tokens of all patches
    of all images, approximate for a sample. NaN if the tokens are not finite or too few to estimate the rest.
    A growing share of the mean indicates collapse; of the position, a predictor that needs the position alone.
    """
    z = tokens.double()
    count, total = len(z), z.square().sum()
    mean = z.mean(dim=0)
    centred = z - mean
    explained, degrees = [], []
    for group in (places % patches, places // patches):
        names, member = group.unique(return_inverse=True)
        sums = z.new_zeros(len(names), z.shape[1]).index_add(0, member, centred)
        sizes = torch.bincount(member, minlength=len(names)).double()
        explained.append((sums.square().sum(dim=1) / sizes).sum())
        degrees.append(len(names) - 1)
    left = count - 1 - sum(degrees)
    if left < 1 or not torch.isfinite(total) or total == 0:
        return dict.fromkeys(SHARES, float("nan"))
    variance = (centred.square().sum() - explained[0] - explained[1]).clamp_min(0.0) / left
    of_mean = count * mean.square().sum() - variance
    parts = [of_mean, *(sum_ - free * variance for sum_, free in zip(explained, degrees, strict=True))]
    shares = [float((part / total).clamp_min(0.0)) for part in parts]
    shares.append(max(0.0, 1.0 - sum(shares)))
    return {name: share / sum(shares) for name, share in zip(SHARES, shares, strict=True)}
