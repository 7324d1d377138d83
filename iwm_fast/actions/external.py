"""External actions as the vector that conditions the predictor: a controller's input, not a transformation.

Legend: n actions, C components (continuous), A components of the vector. Continuous: A = C, each value minus its
neutral one, divided by the larger of its distances to `low` and `high`; the vector lies in [-1, 1] and neutral is 0.
Discrete: one-hot over A choices; all zeros is no choice, which no manifest holds and controls use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import Views
from iwm_fast.config.external import EXTERNAL
from iwm_fast.config.schema import ActionsConfig, ExternalActions
from iwm_fast.errors import UserError

__all__ = ["ExternalSpace", "action_dim", "space_of"]

Array = NDArray[Any]


class ExternalSpace(ActionSpace):
    """The space of external actions: names, dimension and scale, as a run records them."""

    def __init__(self, external: ExternalActions) -> None:
        self.external = external
        self.groups = EXTERNAL
        self.form = "external"
        self.components = ()
        self.slices = {name: slice(place, place + 1) for place, name in enumerate(external.names)}
        self.names = external.names
        self.dim = len(external.names)
        self._neutral = np.array(external.neutral, np.float64)
        reach = np.maximum(np.array(external.high) - self._neutral, self._neutral - np.array(external.low))
        self._reach = np.where(reach > 0, reach, 1.0)

    def encode(self, views: Views) -> NDArray[np.float32]:
        """Raise ValueError: views have no external action; use `encode_values`."""
        raise ValueError(f"{len(views)} views have no external action; encode_values takes a manifest's values")

    def encode_values(self, values: Array) -> NDArray[np.float32]:
        """Return float32 (n, A) from a manifest's values: float64 (n, C), or int64 (n,) choices. Raises ValueError
        otherwise.
        """
        values = np.asarray(values)
        if self.external.kind == "discrete":
            if values.ndim != 1 or ((values < 0) | (values >= self.dim)).any():
                raise ValueError(f"values has shape {values.shape}; it must be (n,), choices from 0 to {self.dim - 1}")
            return np.asarray(values[:, None] == np.arange(self.dim), np.float32)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"values has shape {values.shape}; it must be (n, {self.dim})")
        return np.asarray((values - self._neutral) / self._reach, np.float32)

    def decode(self, action: Array) -> dict[str, Array]:
        """Return values by name, float64 (n,), of actions (n, A); for discrete actions one bool per choice."""
        action = np.asarray(action, np.float64)
        if action.ndim != 2 or action.shape[1] != self.dim:
            raise ValueError(f"action has shape {action.shape}; it must be (n, {self.dim})")
        if self.external.kind == "discrete":
            return {name: action[:, place] > 0.5 for place, name in enumerate(self.names)}
        values = action * self._reach + self._neutral
        return {name: values[:, place] for place, name in enumerate(self.names)}

    def vector(self, values: Mapping[str, float]) -> NDArray[np.float32]:
        """Return one action float32 (A,) from values by name; the rest is neutral, and a choice has the value 1.

        Raises ValueError for an unknown name.
        """
        self._require_known(values)
        if self.external.kind == "discrete":
            return np.array([float(values.get(name, 0.0)) for name in self.names], np.float32)
        given = [values.get(name, neutral) for name, neutral in zip(self.names, self.external.neutral, strict=True)]
        return np.asarray(self.encode_values(np.array([given], np.float64))[0], np.float32)


def space_of(actions: ActionsConfig) -> ActionSpace:
    """Return the action space of a configuration. Raises UserError where external actions are not described."""
    if not actions.is_external:
        return ActionSpace(actions.groups, actions.form)
    if actions.external is None:
        raise UserError(
            "actions.external is not set: set data.root to a manifest of triplets, which describes the actions"
        )
    return ExternalSpace(actions.external)


def action_dim(actions: ActionsConfig) -> int:
    """Return the components of the vector. Raises UserError where external actions are not described."""
    if not actions.is_external:
        return ActionSpace(actions.groups, actions.form).dim
    if actions.external is None:
        raise UserError("actions.external is not set: name the actions as in docs/guides/triplets.md")
    return len(actions.external.names)
