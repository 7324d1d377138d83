"""Terms that prevent collapse of the encoder's representation, for a target without an EMA.

Both are statistics over the global batch of z in fp32: the tokens of the sources' visible patches (`on: tokens`) or
their mean per image (`pooled`); `center: position` subtracts the batch mean at each patch position.

SIGReg (LeJEPA, arXiv:2511.08544) compares z, projected on K random directions a_k, with a standard Gaussian, by the
characteristic functions at knots t_j, equally spaced on [0, 3]:

    R = 1/K · Σ_k Σ_j ω_j · [(C_kj − φ_j)² + S_kj²],  φ_j = exp(−t_j² / 2),  ω_j = 2 Δt φ_j, half of it at both ends

with C_kj and S_kj the means of cos(t_j p) and sin(t_j p) over p = a_k · z. VICReg (arXiv:2105.04906) penalises a
std below 1 and covariances between features:

    R = 1/D · Σ_d max(0, 1 − √(Var_d + 1e-4)) + 0.04 · 1/D · Σ_{d ≠ e} Cov_de²

`mean_weight` · ‖mean of z‖² / D is added to either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm_fast import kernels
from iwm_fast.config.schema import ModelConfig
from iwm_fast.config.sections.model import RegularizerConfig
from iwm_fast.models.losses import ForwardPass, GlobalBatch, Term

__all__ = ["SigReg", "VicReg", "regularizer_of"]

_LAST_KNOT = 3.0
_GOLDEN = 0x9E3779B97F4A7C15  # odd: nearby seeds give unrelated numbers
_STD_EPS = 1e-4
_COVARIANCE = 0.04  # VICReg's ratio of covariance (1) to variance (25)


@dataclass(frozen=True)
class _Statistic:
    """Base of both terms. positions: patches per image. width: D of a token."""

    options: RegularizerConfig
    positions: int
    width: int

    @property
    def weight(self) -> float:
        """As configured."""
        return self.options.weight

    def divisor(self, batch: GlobalBatch) -> float:
        """Return the number of micro-batches: the statistic is over all ranks' tokens, equal on each."""
        return batch.micro_batches

    def rows(self, found: ForwardPass) -> tuple[Tensor, Tensor]:
        """Return z, fp32 (N, D), and its number of real rows, int64 (1,). Padding rows follow them and are 0."""
        segments, images = found.context_segments, found.context_segments.images
        count = segments.cu_seqlens[images : images + 1].long()
        z = found.context.float()
        if segments.padding:
            z = z.masked_fill((segments.image_of_token >= images)[:, None], 0.0)
        if self.options.center == "position":
            sums = z.new_zeros(self.positions, self.width + 1)
            ones = (segments.image_of_token < images).float()[:, None]
            sums = found.sum_over_ranks(sums.index_add(0, found.context_patches, torch.cat((z, ones), dim=1)))
            means = sums[:, :-1] / sums[:, -1:].clamp_min(1.0)
            z = (z - means.index_select(0, found.context_patches)) * ones
        if self.options.on == "tokens":
            return z, count
        lengths = segments.cu_seqlens[: images + 1].diff()[:, None]
        pooled = z.new_zeros(images + segments.padding, self.width).index_add(0, segments.image_of_token, z)
        return pooled[:images] / lengths.clamp_min(1), torch.full_like(count, images)

    def total(self, found: ForwardPass, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return each part summed over the ranks, in one all-reduce."""
        whole = found.sum_over_ranks(torch.cat([part.flatten().float() for part in parts]))
        return [a.view(b.shape) for a, b in zip(whole.split([p.numel() for p in parts]), parts, strict=True)]

    def mean_penalty(self, mean: Tensor) -> Tensor:
        """Return mean_weight · ‖mean‖² / D."""
        return self.options.mean_weight * mean.square().mean()


@dataclass(frozen=True)
class SigReg(_Statistic):
    """SIGReg of the encoder's tokens; its directions are sampled from (seed, step)."""

    name: str = "sigreg"

    def sample(self, seed: int, step: int, device: torch.device) -> Tensor:
        """Return directions, fp32 (D, K), each of length 1."""
        generator = torch.Generator(device).manual_seed((seed * _GOLDEN + step) % 2**63)
        shape = self.width, self.options.directions
        return F.normalize(torch.randn(shape, generator=generator, device=device), dim=0)

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        """Return factor · (R + the mean's penalty), fp32."""
        z, count = self.rows(found)
        intervals = self.options.knots - 1
        spacing = _LAST_KNOT / intervals
        with kernels.without_autocast(z):
            projected = z @ found.sampled[self.name]
        sums = kernels.sigreg_sums(projected, spacing=spacing, knots=intervals, rows=count)
        sums, mean, n = self.total(found, (sums, z.sum(dim=0), count))
        cosine, sine = sums / n
        t = spacing * torch.arange(1, intervals + 1, device=z.device)
        phi = torch.exp(-0.5 * t.square())[:, None]
        # At t = 0 both functions are 1. The last knot is an end of the trapezoidal rule, with half the weight.
        half = torch.where(t < t[-1], 2.0, 1.0)[:, None]
        distances = spacing * half * phi * ((cosine - phi).square() + sine.square())
        return factor * (distances.sum(dim=0).mean() + self.mean_penalty(mean / n))


@dataclass(frozen=True)
class VicReg(_Statistic):
    """VICReg's variance and covariance terms of the encoder's tokens."""

    name: str = "vicreg"

    def __call__(self, found: ForwardPass, factor: float) -> Tensor:
        """Return factor · (R + the mean's penalty), fp32."""
        z, count = self.rows(found)
        with kernels.without_autocast(z):
            squares = z.T @ z
        squares, total, n = self.total(found, (squares, z.sum(dim=0), count))
        mean = total / n
        covariance = (squares - n * torch.outer(mean, mean)) / (n - 1)
        variance = covariance.diagonal()
        std = F.relu(1.0 - (variance + _STD_EPS).clamp_min(_STD_EPS).sqrt()).mean()
        between = (covariance.square().sum() - variance.square().sum()) / self.width
        return factor * (std + _COVARIANCE * between + self.mean_penalty(mean))


def regularizer_of(model: ModelConfig) -> Term | None:
    """Return the configuration's regulariser, or None."""
    options = model.regularizer
    sizes = options, model.grid**2, model.encoder_shape.width
    if options.kind == "sigreg":
        return SigReg(*sizes)
    return VicReg(*sizes) if options.kind == "vicreg" else None
