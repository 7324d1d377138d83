"""Signs of collapse in the target's representation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iwm_fast.config import Config
from iwm_fast.engine.metrics.episodes import Episode

__all__ = ["CollapseWatch", "rank_me", "spread"]

# An episode ends when RankMe recovers to this multiple of the floor.
_RECOVERED = 1.5
# The mean's share of the tokens' energy above which they are nearly one vector; how far it has to have grown, because
# images that are nearly equal begin there; and where it has recovered. Healthy and collapsed runs: docs/health.png.
_MEAN_SHARE, _MEAN_GROWTH, _MEAN_RECOVERED = 0.8, 0.2, 0.7


def rank_me(tokens: Tensor) -> float:
    """RankMe (Garrido et al. 2023, arXiv:2210.02885): exp of the entropy of the normalised singular values of (T, D)
    tokens.

    Computed from the eigenvalues of the D × D Gram matrix in float64, which is faster than an SVD of the tokens when
    T ≫ D. A perfectly collapsed representation gives 1, an isotropic one D; tokens that are not finite give NaN.
    """
    x = tokens.double()
    if not torch.isfinite(x).all():
        return float("nan")
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    singular = eigenvalues.clamp_min(0.0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def spread(tokens: Tensor) -> float:
    """Return the mean over the D features of the std across (T, D) tokens; 0 where all tokens are equal."""
    return float(tokens.float().std(dim=0, unbiased=False).mean())


_PARTS = {
    "energy_mean": "the mean of all",
    "energy_position": "what the position of a patch explains",
    "energy_image": "what the image explains",
    "energy_rest": "what differs from token to token",
}


def _energy(before: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """Return the part of the tokens' energy that grew most (without an earlier record: the largest); "" if unknown."""
    if not all(math.isfinite(record.get(name, math.nan)) for record in (before or now, now) for name in _PARTS):
        return ""
    if before is None:
        largest = max(_PARTS, key=lambda name: float(now[name]))
        return f"; {now[largest]:.0%} of the tokens' energy is {_PARTS[largest]}"
    grown = max(_PARTS, key=lambda name: float(now[name] - before[name]))
    return f"; of the tokens' energy, {_PARTS[grown]} grew from {before[grown]:.0%} to {now[grown]:.0%}"


class CollapseWatch:
    """Warns once per episode of collapse: RankMe of the target under ``log.rank_me_floor`` of the encoder's width, or a
    partial one, in which the mean takes over the energy of the target's tokens while RankMe is still above it. Of a
    frozen target never: its weights do not change.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._constant = config.model.target == "frozen" or config.model.freeze_encoder
        self._width = config.model.target_architecture.shape.width
        self._floor = config.log.rank_me_floor * self._width
        self._recovered = min(_RECOVERED * self._floor, (self._floor + self._width) / 2)
        self._episode = Episode()
        self._highest: dict[str, Any] | None = None
        self._lowest_mean = math.inf

    def look(self, record: dict[str, Any]) -> str | None:
        """Return the warning for a logged step, with the numbers and the keys to change; None if there is none."""
        if self._constant or "rank_me" not in record:
            return None
        found, mean = record["rank_me"], record.get("energy_mean", math.nan)
        self._lowest_mean = min(self._lowest_mean, mean if math.isfinite(mean) else math.inf)
        seen = found < self._floor or (mean >= _MEAN_SHARE and mean - self._lowest_mean >= _MEAN_GROWTH)
        if self._episode.begins(seen, gone=found >= self._recovered and not mean >= _MEAN_RECOVERED):
            line = f"step {record['step']}: the target may be collapsing: {self._seen(record)}. {self._remedies()}"
            self._highest = None  # the next episode compares with the recovered values
            return line
        if not seen and found >= self._floor and (self._highest is None or found > self._highest["rank_me"]):
            self._highest = record
        return None

    def _seen(self, record: dict[str, Any]) -> str:
        before, width = self._highest, f"of {self._width}"
        under = f"the warning begins below {self._floor:.1f}, log.rank_me_floor"
        if not record["rank_me"] < self._floor:
            under = f"above {self._floor:.1f}, log.rank_me_floor, but the mean has taken over"
        if before is None:
            fell = f"RankMe is {record['rank_me']:.1f} {width} ({under}), loss {record['loss']:.3g}"
        else:
            fell = (
                f"RankMe fell from {before['rank_me']:.1f} at step {before['step']} to {record['rank_me']:.1f} {width} "
                f"({under}), loss from {before['loss']:.3g} to {record['loss']:.3g}"
            )
        return fell + _energy(before, record)

    def _remedies(self) -> str:
        train, model = self._config.train, self._config.model
        ways = [f"lower train.lr ({train.lr:g})", f"lengthen train.warmup ({train.warmup})"]
        if model.target == "ema":
            ways.insert(0, f"move train.ema ({train.ema[0]:g} to {train.ema[1]:g}) nearer to 1")
        else:
            ways.insert(0, "set model.target=ema")
        if model.regularizer.kind == "none":
            ways.append("add model.regularizer.kind=vicreg or sigreg")
        return f"Resume from an earlier checkpoint or start a new run: {', '.join(ways)}"
