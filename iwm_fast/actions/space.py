"""The action vector: names, order and scale of its components, to and from physical values.

Legend: B images, A components of an action vector. a(x→y), float32 (B, A), leads from the source x to the target y. The
action between two equal clean views is zero. Source: arXiv:2403.00504, section 4 (differences of jitter, indicators of
destructive transformations).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.transforms import (
    COMPONENTS,
    CORRUPTIONS,
    JITTER,
    Array,
    Corruption,
    Floats,
    Geometry,
    Jitter,
    Views,
    component,
)

__all__ = ["ActionSpace"]


def _wrap(degrees: Floats) -> Floats:
    """The same angle in (-180, 180]."""
    return 180.0 - (180.0 - degrees) % 360.0


class ActionSpace:
    """The components that condition a predictor, their order and their scale.

    form "difference": jitter as target minus source (the paper's). form "absolute": each jitter component twice, of the
    source and of the target.
    """

    def __init__(self, groups: tuple[str, ...] = ("photometric",), form: str = "difference") -> None:
        """Raise ValueError for an unknown group or form."""
        known = tuple(dict.fromkeys(component.group for component in COMPONENTS))
        if not groups or set(groups) - set(known):
            raise ValueError(f"groups is {groups}; it must name one or more of {known}")
        if form not in ("difference", "absolute"):
            raise ValueError(f"form is {form!r}; it must be 'difference' or 'absolute'")
        self.groups = tuple(groups)
        self.form = form
        self.components = tuple(component for component in COMPONENTS if component.group in groups)
        names: list[str] = []
        self.slices: dict[str, slice] = {}
        for part in self.components:
            own = [part.name]
            if form == "absolute" and part.name in JITTER:
                own = [f"source_{part.name}", f"target_{part.name}"]
            self.slices[part.name] = slice(len(names), len(names) + len(own))
            names += own
        self.names: tuple[str, ...] = tuple(names)
        self.dim = len(names)

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions that are part of the action."""
        return tuple(corruption for corruption in CORRUPTIONS if corruption.group in self.groups)

    def encode(self, views: Views) -> NDArray[np.float32]:
        """Return the action a(x→y) of each pair of views: float32 (B, A), 0 where nothing was applied."""
        columns = self._jitter_columns(views.source, views.target)
        for corruption in self.corruptions:
            columns |= corruption.encoded(getattr(views, corruption.column))
        if "geometric" in self.groups:
            columns |= _geometric_columns(views.source_geometry, views.target_geometry)
        return self._stack(columns, len(views))

    def jitter_action(self, source: Jitter, target: Jitter) -> NDArray[np.float32]:
        """Return the action of views that differ in jitter only: float32 (B, A)."""
        return self._stack(self._jitter_columns(source, target), len(source))

    def decode(self, action: Array) -> dict[str, Array]:
        """Invert `encode`: return physical values, float64 (B,), by component name from an action (B, A).

        Differences stay differences (brightness 0 means equal factors), absolute values are the operators'
        (source_brightness 1 is neutral), flags are bool, and a strength that is encoded as a distance is the operator's
        int64, such as a solarize_threshold with 256 for none.
        """
        action = np.asarray(action, np.float64)
        if action.ndim != 2 or action.shape[1] != self.dim:
            raise ValueError(f"action has shape {action.shape}; it must be (B, {self.dim})")
        values: dict[str, Array] = {}
        for part in self.components:
            own = self.slices[part.name]
            for name, column in zip(self.names[own], action[:, own].T, strict=True):
                value = column * part.range + _offset(name, part.neutral)
                values[name] = column > 0.5 if part.unit == "flag" else value
        for corruption in self.corruptions:
            if corruption.strength is not None and corruption.top is not None:
                strength = corruption.reflected(np.rint(values[corruption.strength])).astype(np.int64)
                values[corruption.strength] = np.where(values[corruption.name], strength, corruption.none)
        return values

    def vector(self, values: Mapping[str, float]) -> NDArray[np.float32]:
        """Return one action float32 (A,) from physical values by name; the rest is neutral. `decode` inverts it.

        A strength (a sigma, a threshold) sets its flag too. Raises ValueError for a name that is not in `names`.
        """
        self._require_known(values)
        given = {name: float(value) for name, value in values.items()}
        for corruption in self.corruptions:
            if corruption.strength in given:
                done = corruption.done(given[corruption.strength])
                if corruption.top is not None:
                    given[corruption.strength] = corruption.reflected(given[corruption.strength]) if done else 0.0
                given[corruption.name] = float(done)
        action = np.zeros(self.dim, np.float32)
        for part in self.components:
            own = self.slices[part.name]
            for index, name in enumerate(self.names[own], own.start):
                offset = _offset(name, part.neutral)
                action[index] = (given.get(name, offset) - offset) / part.range
        return action

    def _require_known(self, names: Iterable[str]) -> None:
        """Raise ValueError for a name that is not in `names`."""
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no component of this action; there are {', '.join(self.names)}")

    def _jitter_columns(self, source: Jitter, target: Jitter) -> dict[str, Array]:
        columns: dict[str, Array] = {}
        for name in JITTER if "photometric" in self.groups else ():
            x, y = getattr(source, name).astype(np.float64), getattr(target, name).astype(np.float64)
            part = component(name)
            pairs = {name: y - x} if self.form == "difference" else {f"source_{name}": x, f"target_{name}": y}
            for key, value in pairs.items():
                offset = value - _offset(key, part.neutral)
                columns[key] = (_wrap(offset) if part.unit == "degrees" else offset) / part.range
        return columns

    def _stack(self, columns: Mapping[str, Array], count: int) -> NDArray[np.float32]:
        action = np.zeros((count, self.dim), np.float32)
        for index, name in enumerate(self.names):
            if name in columns:
                action[:, index] = columns[name]
        return action


def _offset(name: str, neutral: float) -> float:
    """The value that is encoded as 0: no difference for a difference of jitter, else the neutral value."""
    return 0.0 if name in JITTER else neutral


def _geometric_columns(source: Geometry, target: Geometry) -> dict[str, Array]:
    """Where x lies in the frame of y, normalised; float64 (B,) each.

    Undo x's turn by the quarter turns of rotation_1..3 and mirror it if flip: that is x's box as y sees it (mirrored
    where y is), with its centre crop_x widths and crop_y heights of y from y's centre and exp(crop_w), exp(crop_h)
    times y's size.
    """
    if target.rotation.any():
        raise ValueError("a target view is rotated; rotate sources only, the action is in the target's frame")
    x_size, y_size = source.crop[:, 2:].astype(np.float64), target.crop[:, 2:].astype(np.float64)
    offset = (source.crop[:, :2] + x_size / 2 - target.crop[:, :2] - y_size / 2) / y_size
    offset[:, 0] *= np.where(target.flip, -1.0, 1.0)
    ratio = np.log(x_size / y_size)
    undo = -source.rotation % 4
    values = {
        "crop_x": offset[:, 0],
        "crop_y": offset[:, 1],
        "crop_w": ratio[:, 0],
        "crop_h": ratio[:, 1],
        "flip": (source.flip != target.flip).astype(np.float64),
    }
    values |= {f"rotation_{turns}": (undo == turns).astype(np.float64) for turns in (1, 2, 3)}
    return {name: value / component(name).range for name, value in values.items()}
