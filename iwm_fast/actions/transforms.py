"""What a transformation is: the one place that knows its parameters, and how a predictor is told of them.

Legend: B images, A components of an action vector. `Views` is everything that was done to B images, in the operators'
own units; an `ActionSpace` turns it into the vector a(x→y), float32 (B, A), which says how to get from the source x to
the target y. `COMPONENTS` is the table of its parts, in their order. Whatever was not done counts as its neutral value
and is encoded as 0, so the action of two equal clean views is the zero vector.
Sources: arXiv:2403.00504 section 4 (differences of jitter, indicators of destructive transformations); the colour
transformation is DALI's `color_twist`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COMPONENTS",
    "NO_SOLARIZE",
    "ActionSpace",
    "Component",
    "Geometry",
    "Jitter",
    "Views",
    "colour_matrix",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]

# Levels are 0 to 255 and those at or above the threshold are inverted, so at 256 nothing happens.
NO_SOLARIZE = 256
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Component:
    """One number of an action vector: the physical value, its neutral value taken off, divided by `range`."""

    name: str
    group: str
    unit: str
    range: float
    neutral: float
    doc: str


COMPONENTS: tuple[Component, ...] = (
    Component("brightness", "photometric", "factor", 0.8, 1.0, "target's factor minus source's"),
    Component("contrast", "photometric", "factor", 0.8, 1.0, "target's factor minus source's"),
    Component("saturation", "photometric", "factor", 0.4, 1.0, "target's factor minus source's"),
    Component("hue", "photometric", "degrees", 72.0, 0.0, "target's YIQ angle minus source's, in (-180, 180]"),
    Component("grayscale", "photometric", "flag", 1.0, 0.0, "1: the source lost its colour"),
    Component("blur", "photometric", "flag", 1.0, 0.0, "1: the source was blurred"),
    Component("blur_sigma", "photometric", "pixels", 2.0, 0.0, "Gaussian sigma of the source's blur, 0 without"),
    Component("solarize", "photometric", "flag", 1.0, 0.0, "1: the source was solarized"),
    Component(
        "solarize_threshold",
        "photometric",
        "levels",
        255.0,
        0.0,
        "255 - t where levels t and above were inverted, 0 without; decoded to t",
    ),
    Component("crop_x", "geometric", "target widths", 1.0, 0.0, "source box's centre, right of the target box's"),
    Component("crop_y", "geometric", "target heights", 1.0, 0.0, "source box's centre, below the target box's"),
    Component("crop_w", "geometric", "natural log", 1.0, 0.0, "source box's width over the target box's"),
    Component("crop_h", "geometric", "natural log", 1.0, 0.0, "source box's height over the target box's"),
    Component("flip", "geometric", "flag", 1.0, 0.0, "1: exactly one of the two views is mirrored"),
    Component("rotation_1", "geometric", "flag", 1.0, 0.0, "1: a quarter turn, counter-clockwise, undoes the source's"),
    Component("rotation_2", "geometric", "flag", 1.0, 0.0, "1: two quarter turns undo the source's"),
    Component("rotation_3", "geometric", "flag", 1.0, 0.0, "1: three quarter turns undo the source's"),
)
_TABLE = {component.name: component for component in COMPONENTS}
_JITTER = ("brightness", "contrast", "saturation", "hue")


def _take(record: Any, rows: Array) -> dict[str, Array]:
    return {field.name: getattr(record, field.name)[rows] for field in fields(record)}


def _join(records: list[Any]) -> dict[str, Array]:
    return {field.name: np.concatenate([getattr(r, field.name) for r in records]) for field in fields(records[0])}


def _require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be {shape}, as the first field says")


@dataclass(frozen=True, eq=False)
class Jitter:
    """Colour jitter of B views as `color_twist` takes it, float32 (B,): three factors (neutral 1), hue in degrees."""

    brightness: Array
    contrast: Array
    saturation: Array
    hue: Array

    def __post_init__(self) -> None:
        """Raise ValueError unless the four arrays are (B,)."""
        for name in _JITTER:
            _require_shape(name, getattr(self, name), (len(self.brightness),))

    def __len__(self) -> int:
        return len(self.brightness)

    def take(self, rows: Array) -> Jitter:
        """The jitter of the given rows (any NumPy index of one axis)."""
        return Jitter(**_take(self, rows))

    @staticmethod
    def neutral(count: int) -> Jitter:
        """`count` views whose colours stay as they are."""
        return Jitter(**{n: np.full(count, _TABLE[n].neutral, np.float32) for n in _JITTER})


@dataclass(frozen=True, eq=False)
class Geometry:
    """Which part of the upright image a view shows, and how: crop, then resize to a square, flip, rotation.

    crop: int64 (B, 4), x, y, width, height in pixels; flip: bool (B,), mirrored left to right; rotation: int64 (B,),
    quarter turns counter-clockwise, 0 to 3, made after the flip.
    """

    crop: Array
    flip: Array
    rotation: Array

    def __post_init__(self) -> None:
        """Raise ValueError unless the arrays are (B, 4), (B,) and (B,)."""
        _require_shape("crop", self.crop, (len(self.crop), 4))
        _require_shape("flip", self.flip, (len(self.crop),))
        _require_shape("rotation", self.rotation, (len(self.crop),))

    def __len__(self) -> int:
        return len(self.crop)

    def take(self, rows: Array) -> Geometry:
        """The geometry of the given rows."""
        return Geometry(**_take(self, rows))


@dataclass(frozen=True, eq=False)
class Views:
    """Everything that was done to B images to get their target and source views.

    size: int64 (B, 2), width and height of the upright image in pixels. grayscale: bool (B,); blur_sigma: float32 (B,)
    in pixels, 0 for none; solarize_threshold: int64 (B,), 256 for none: these three are done to the source only.
    shared_geometry: both views start from one cropped image, and source_geometry is target_geometry.
    """

    size: Array
    target_geometry: Geometry
    source_geometry: Geometry
    target: Jitter
    source: Jitter
    grayscale: Array
    blur_sigma: Array
    solarize_threshold: Array
    shared_geometry: bool

    def __post_init__(self) -> None:
        """Raise ValueError where a part is not of B rows, or the geometry is not shared though said to be."""
        count = len(self.size)
        _require_shape("size", self.size, (count, 2))
        for name in ("grayscale", "blur_sigma", "solarize_threshold"):
            _require_shape(name, getattr(self, name), (count,))
        for name in ("target_geometry", "source_geometry", "target", "source"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows; size has {count}")
        if self.shared_geometry and self.source_geometry is not self.target_geometry:
            raise ValueError("shared_geometry is True, so source_geometry must be the same object as target_geometry")

    def __len__(self) -> int:
        return len(self.size)

    def take(self, rows: Array) -> Views:
        """The views of the given rows (any NumPy index of one axis)."""
        target_geometry = self.target_geometry.take(rows)
        return Views(
            size=self.size[rows],
            target_geometry=target_geometry,
            source_geometry=target_geometry if self.shared_geometry else self.source_geometry.take(rows),
            target=self.target.take(rows),
            source=self.source.take(rows),
            grayscale=self.grayscale[rows],
            blur_sigma=self.blur_sigma[rows],
            solarize_threshold=self.solarize_threshold[rows],
            shared_geometry=self.shared_geometry,
        )

    @staticmethod
    def concatenate(parts: list[Views]) -> Views:
        """One after the other, at least one; ValueError where some share their geometry and some do not."""
        shared = {part.shared_geometry for part in parts}
        if len(shared) != 1:
            raise ValueError("parts must not be empty, and all or none of them must have shared_geometry")
        geometry = Geometry(**_join([part.target_geometry for part in parts]))
        return Views(
            size=np.concatenate([part.size for part in parts]),
            target_geometry=geometry,
            source_geometry=geometry if shared == {True} else Geometry(**_join([p.source_geometry for p in parts])),
            target=Jitter(**_join([part.target for part in parts])),
            source=Jitter(**_join([part.source for part in parts])),
            grayscale=np.concatenate([part.grayscale for part in parts]),
            blur_sigma=np.concatenate([part.blur_sigma for part in parts]),
            solarize_threshold=np.concatenate([part.solarize_threshold for part in parts]),
            shared_geometry=shared == {True},
        )

    @staticmethod
    def neutral(size: Array, crop: Array) -> Views:
        """Clean views: size (B, 2), crop (B, 4), nothing else done; target and source are the same."""
        count = len(size)
        geometry = Geometry(np.asarray(crop, np.int64), np.zeros(count, bool), np.zeros(count, np.int64))
        return Views(
            size=np.asarray(size, np.int64),
            target_geometry=geometry,
            source_geometry=geometry,
            target=Jitter.neutral(count),
            source=Jitter.neutral(count),
            grayscale=np.zeros(count, bool),
            blur_sigma=np.zeros(count, np.float32),
            solarize_threshold=np.full(count, NO_SOLARIZE, np.int64),
            shared_geometry=True,
        )


def _wrap(degrees: Floats) -> Floats:
    """The same angle in (-180, 180]."""
    return 180.0 - (180.0 - degrees) % 360.0


class ActionSpace:
    """The components a predictor is told, their order and their scale.

    form "difference": jitter as target minus source (the paper's). form "absolute": each jitter component twice, the
    source's and the target's own value, so that nothing about either view is left out.
    """

    def __init__(self, groups: tuple[str, ...] = ("photometric",), form: str = "difference") -> None:
        """ValueError for a group or a form that does not exist."""
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
        for component in self.components:
            own = [component.name]
            if form == "absolute" and component.name in _JITTER:
                own = [f"source_{component.name}", f"target_{component.name}"]
            self.slices[component.name] = slice(len(names), len(names) + len(own))
            names += own
        self.names: tuple[str, ...] = tuple(names)
        self.dim = len(names)

    def encode(self, views: Views) -> NDArray[np.float32]:
        """The action a(x→y) of each pair of views: float32 (B, A), 0 where nothing was done."""
        columns = self._jitter_columns(views.source, views.target)
        if "photometric" in self.groups:
            columns |= _destructive_columns(views)
        if "geometric" in self.groups:
            columns |= _geometric_columns(views.source_geometry, views.target_geometry)
        return self._stack(columns, len(views))

    def jitter_action(self, source: Jitter, target: Jitter) -> NDArray[np.float32]:
        """The action of views that differ in their jitter only: float32 (B, A)."""
        return self._stack(self._jitter_columns(source, target), len(source))

    def decode(self, action: Array) -> dict[str, Array]:
        """The inverse of `encode`: action (B, A) to physical values, float64 (B,), by component name.

        Differences stay differences (brightness 0 means equal factors), absolute values come out as the operators used
        them (source_brightness 1 is neutral), flags are bool, and solarize_threshold is int64 with 256 for none.
        """
        action = np.asarray(action, np.float64)
        if action.ndim != 2 or action.shape[1] != self.dim:
            raise ValueError(f"action has shape {action.shape}; it must be (B, {self.dim})")
        values: dict[str, Array] = {}
        for component in self.components:
            own = self.slices[component.name]
            for name, column in zip(self.names[own], action[:, own].T, strict=True):
                differs = name in _JITTER
                value = column * component.range + (0.0 if differs else component.neutral)
                values[name] = column > 0.5 if component.unit == "flag" else value
        if "photometric" in self.groups:
            threshold = 255 - np.rint(values["solarize_threshold"]).astype(np.int64)
            values["solarize_threshold"] = np.where(values["solarize"], threshold, NO_SOLARIZE)
        return values

    def vector(self, values: Mapping[str, float]) -> NDArray[np.float32]:
        """One action from physical values by name, float32 (A,): `decode` gives them back; the rest is neutral.

        A sigma or a threshold sets its flag too. ValueError for a name that is not in `names`.
        """
        unknown = sorted(set(values) - set(self.names))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no component of this action; there are {', '.join(self.names)}")
        action = np.zeros(self.dim, np.float32)
        for component in self.components:
            own = self.slices[component.name]
            for index, name in enumerate(self.names[own], own.start):
                value = float(values.get(name, 0.0 if name in _JITTER else component.neutral))
                offset = 0.0 if name in _JITTER else component.neutral
                if name == "solarize_threshold":  # the table says so: told as its distance from the highest level
                    value = 255.0 - value if name in values and value < NO_SOLARIZE else 0.0
                action[index] = (value - offset) / component.range
        if "blur_sigma" in values:
            action[self.names.index("blur")] = values["blur_sigma"] > 0
        if "solarize_threshold" in values:
            action[self.names.index("solarize")] = values["solarize_threshold"] < NO_SOLARIZE
        return action

    def _jitter_columns(self, source: Jitter, target: Jitter) -> dict[str, Floats]:
        columns: dict[str, Floats] = {}
        for name in _JITTER if "photometric" in self.groups else ():
            x, y = getattr(source, name).astype(np.float64), getattr(target, name).astype(np.float64)
            neutral = _TABLE[name].neutral
            pairs = {name: y - x} if self.form == "difference" else {f"source_{name}": x, f"target_{name}": y}
            for key, value in pairs.items():
                offset = value if self.form == "difference" else value - neutral
                columns[key] = (_wrap(offset) if name == "hue" else offset) / _TABLE[name].range
        return columns

    def _stack(self, columns: dict[str, Floats], count: int) -> NDArray[np.float32]:
        action = np.zeros((count, self.dim), np.float32)
        for index, name in enumerate(self.names):
            if name in columns:
                action[:, index] = columns[name]
        return action


def _destructive_columns(views: Views) -> dict[str, Floats]:
    """What was done to the source alone, normalised; float64 (B,) each."""
    solarize = views.solarize_threshold < NO_SOLARIZE
    depth = (255 - views.solarize_threshold) / _TABLE["solarize_threshold"].range
    return {
        "grayscale": views.grayscale.astype(np.float64),
        "blur": (views.blur_sigma > 0).astype(np.float64),
        "blur_sigma": views.blur_sigma / _TABLE["blur_sigma"].range,
        "solarize": solarize.astype(np.float64),
        "solarize_threshold": np.where(solarize, depth, 0.0),
    }


def _geometric_columns(source: Geometry, target: Geometry) -> dict[str, Floats]:
    """Where x lies in the frame of y, normalised; float64 (B,) each.

    Undo x's turn with the quarter turns of rotation_1..3 and mirror it if flip: that is x's box as y sees it (mirrored
    where y is), with its centre crop_x widths and crop_y heights of y from y's centre and exp(crop_w), exp(crop_h)
    times y's size.
    """
    if target.rotation.any():
        raise ValueError("a target view is rotated; only sources are, the action is told in the target's frame")
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
    return {name: value / _TABLE[name].range for name, value in values.items()}


def colour_matrix(jitter: Jitter) -> Floats:
    """The affine map of colour that the jitter is: float64 (B, 3, 4), for RGB levels 0 to 255.

    out = M[:, :, :3] @ rgb + M[:, :, 3], rounded and clipped once, with b, c, s the factors and h the hue angle:
    out = Q⁻¹ · R(h) · diag(1, s, s) · Q · (b·c) · in + 128·(1 - c)·b, Q the YIQ matrix. This is what DALI's
    `color_twist` computes (measured on 2.4: mean difference under 1e-4 of a level).
    """
    b, c, s, hue = (getattr(jitter, name).astype(np.float64) for name in _JITTER)
    cos, sin = s * np.cos(np.radians(hue)), s * np.sin(np.radians(hue))
    turn = np.zeros((len(jitter), 3, 3))  # R(h) · diag(1, s, s)
    turn[:, 0, 0] = 1.0
    turn[:, 1, 1], turn[:, 1, 2] = cos, sin
    turn[:, 2, 1], turn[:, 2, 2] = -sin, cos
    matrix = np.empty((len(jitter), 3, 4))
    matrix[:, :, :3] = (_RGB @ turn @ _YIQ) * (b * c)[:, None, None]
    matrix[:, :, 3] = (128.0 * (1.0 - c) * b)[:, None]
    return matrix
