"""How well the recorded state is read from roll-outs: a prediction error in units that do not depend on the space.

In a space that has nearly collapsed a small error is no good prediction: a linear head still reads the state from the
targets, and nothing from the predictions. Two heads are fitted on the set's own frames, each on one half of its
episodes; each reads the roll-outs of the other half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iwm_fast.config import DataConfig
from iwm_fast.data.triplets import Triplets
from iwm_fast.eval.ridge import column_variance
from iwm_fast.eval.world_model.planning.state_head import StateHead, fit_half_heads
from iwm_fast.models.iwm import IWM

__all__ = ["StateReader"]


class StateReader:
    """Reads n roll-outs of T steps, given in parts; parity: int64 (n,), of their episodes; true: (n, T, S)."""

    def __init__(
        self, heads: tuple[StateHead, StateHead], parity: NDArray[np.int64], true: NDArray[np.float64]
    ) -> None:
        self._heads, self._parity, self._true = heads, parity, true
        self._read = {name: np.zeros_like(true) for name in ("target", "prediction")}

    @classmethod
    def of(cls, model: IWM, data: DataConfig, triplets: Triplets, rows: NDArray[np.int64]) -> StateReader | None:
        """Return the reader of roll-outs along chains of triplets, int64 (n, T), or None as `fit_half_heads`."""
        heads = fit_half_heads(model, data, triplets)
        if heads is None or triplets.states is None or triplets.episode is None:
            return None
        return cls(heads, triplets.episode[rows[:, 0]] % 2, triplets.states[triplets.target[rows]])

    def add(self, rows: NDArray[np.int64], truth: Tensor, predictions: Tensor) -> None:
        """Read roll-outs ``rows`` from the targets after each action and the predictions, both (b, T, L, D)."""
        for name, tokens in (("target", truth), ("prediction", predictions)):
            for half, head in enumerate(self._heads):
                own = np.flatnonzero(self._parity[rows] == half)
                if len(own):
                    states = head(tokens[own].flatten(0, 1)).double().cpu().numpy()
                    self._read[name][rows[own]] = states.reshape(self._true[rows[own]].shape)

    def result(self) -> dict[str, Any]:
        """Return R² of each component of the state: {target: (S,), prediction: (T, S)}; None where it is constant.

        Errors are over the variance of the component in all of the roll-outs' frames.
        """
        spread, varies = column_variance(self._true.reshape(-1, self._true.shape[2]))
        errors = {name: np.square(read - self._true) for name, read in self._read.items()}
        shares = {"target": errors["target"].mean(axis=(0, 1)), "prediction": errors["prediction"].mean(axis=0)}
        r2 = {name: 1 - share / spread for name, share in shares.items()}
        return {name: np.where(varies, value, np.array(None)).tolist() for name, value in r2.items()}
