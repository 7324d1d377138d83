"""Transformations: the table of their parameters, and the columns that hold them.

Legend: B images. `COMPONENTS` lists the components of an action in order; `CORRUPTIONS` gives for each corruption of
the source the column of `Views` that holds it, and its components. `Views` holds everything applied to B images in the
operators' own units; `space.ActionSpace` turns it into the action vector. What was not applied has its neutral value,
encoded as 0. Sources: arXiv:2403.00504, section 4 (differences of jitter, indicators of destructive transformations);
the colour transformation is DALI's `color_twist`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "COMPONENTS",
    "CORRUPTIONS",
    "JITTER",
    "NO_COMPRESSION",
    "NO_SOLARIZE",
    "Component",
    "Corruption",
    "Geometry",
    "Jitter",
    "Views",
    "colour_matrix",
    "component",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]

# Levels from the threshold up are inverted; they end at 255, so 256 changes nothing.
NO_SOLARIZE = 256
# A JPEG's quality is 1 to 100; above it nothing is applied.
NO_COMPRESSION = 101
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB = np.linalg.inv(_YIQ)


@dataclass(frozen=True)
class Component:
    """One component of an action vector: the physical value minus its neutral value, divided by `range`."""

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
    Component("compression", "compression", "flag", 1.0, 0.0, "1: the source was compressed as JPEG"),
    Component(
        "compression_quality",
        "compression",
        "quality",
        100.0,
        0.0,
        "100 - q where the source was compressed with JPEG quality q, 0 without; decoded to q",
    ),
)
_TABLE = {component.name: component for component in COMPONENTS}


def component(name: str) -> Component:
    """Return the component of that name; KeyError where there is none."""
    return _TABLE[name]


@dataclass(frozen=True)
class Corruption:
    """A transformation of the source alone, with probability `actions.NAME_probability`.

    The component called `name` is its flag. `column` is its column of `Views`, which holds `none` where it is not
    applied. Where it has a strength, `column` is also the name of the strength's component and of the configuration's
    key for its range. The strength is encoded as it is, 0 being none; or, with `top`, as its distance from that weakest
    value.
    """

    name: str
    column: str
    none: float
    dtype: DTypeLike  # of the column
    fed: DTypeLike  # of the DALI operator's input
    top: float | None = None
    lowest: float = 0.0
    highest: float = math.inf
    rule: str = ""  # what a strength can be, for errors
    slides: bool = False  # whether the report has a slider for it
    natural: tuple[float, ...] = ()  # ends of the encoded strength with nothing beyond them

    @property
    def strength(self) -> str | None:
        """The component and key of the strength; None where there is only the flag."""
        return None if self.column == self.name else self.column

    @property
    def group(self) -> str:
        """The group of actions that it belongs to."""
        return _TABLE[self.name].group

    def done(self, values: Any) -> Any:
        """Return where it is applied, from values of the column."""
        return values > self.none if self.top is None else values < self.none

    def reflected(self, values: Any) -> Any:
        """Return a strength as its component encodes it, before the division by its range: with `top`, top − strength.

        It is its own inverse.
        """
        return values if self.top is None else self.top - values

    def encoded(self, values: Array) -> dict[str, Array]:
        """Return the normalised components (B,) of a column (B,)."""
        done = self.done(values)
        flag = {self.name: done.astype(np.float64)}
        if self.strength is None:
            return flag
        return flag | {self.strength: np.where(done, self.reflected(values) / _TABLE[self.strength].range, 0.0)}


# In the order of application, after the jitter.
CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("grayscale", "grayscale", none=0, dtype=bool, fed=bool),
    Corruption(
        "blur",
        "blur_sigma",
        none=0.0,
        dtype=np.float32,
        fed=np.float32,
        rule="a sigma is 0 pixels (none) or more",
        natural=(0.0,),
    ),
    Corruption(
        "solarize",
        "solarize_threshold",
        none=NO_SOLARIZE,
        dtype=np.int64,
        fed=np.uint8,
        top=255,
        highest=NO_SOLARIZE,
        rule=f"a threshold is a level from 0 to 255, or {NO_SOLARIZE} for none",
        natural=(0.0, 1.0),
    ),
    Corruption(
        "compression",
        "compression_quality",
        none=NO_COMPRESSION,
        dtype=np.int64,
        fed=np.int32,
        top=100,
        lowest=1,
        highest=NO_COMPRESSION,
        rule=f"a quality is from 1 to 100, or {NO_COMPRESSION} for none",
        slides=True,
        natural=(0.0, 0.99),
    ),
)


def _require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise ValueError(f"{name} has shape {np.shape(array)}; it must be {shape}, as the first field says")


@dataclass(frozen=True, eq=False)
class _Rows:
    """Columns with one row per view, arrays or nested columns, which are indexed and concatenated together."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, rows: Array) -> Self:
        """Return the given rows, by any NumPy index of one axis."""

        def taken(name: str) -> Any:
            column = getattr(self, name)
            return column.take(rows) if isinstance(column, _Rows) else column[rows]

        return self._columnwise(taken)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenate one or more."""

        def joined(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            return type(columns[0]).concatenate(columns) if isinstance(columns[0], _Rows) else np.concatenate(columns)

        return parts[0]._columnwise(joined)  # noqa: SLF001  (its own class)

    def _columnwise(self, column: Callable[[str], Any]) -> Self:
        """A copy with the columns that `column(name)` returns."""
        return replace(self, **{field.name: column(field.name) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class Jitter(_Rows):
    """Colour jitter of B views as inputs of `color_twist`, float32 (B,): three factors (neutral 1), hue in degrees."""

    brightness: Array
    contrast: Array
    saturation: Array
    hue: Array

    def __post_init__(self) -> None:
        """Raise ValueError unless the four arrays are (B,)."""
        for name in JITTER:
            _require_shape(name, getattr(self, name), (len(self),))

    def changed(self) -> NDArray[np.bool_]:
        """Return which views have any, bool (B,)."""
        parts = [getattr(self, name) != _TABLE[name].neutral for name in JITTER]
        return np.asarray(np.logical_or.reduce(parts), bool)

    @staticmethod
    def neutral(count: int) -> Jitter:
        """Return the jitter of `count` unchanged views."""
        return Jitter(**{n: np.full(count, _TABLE[n].neutral, np.float32) for n in JITTER})


JITTER: tuple[str, ...] = tuple(field.name for field in fields(Jitter))


@dataclass(frozen=True, eq=False)
class Geometry(_Rows):
    """The part of the upright image that a view shows: crop, then resize to a square, flip, rotation.

    crop: int64 (B, 4), x, y, width, height in pixels; flip: bool (B,), mirrored left to right; rotation: int64 (B,),
    quarter turns counter-clockwise, 0 to 3, after the flip.
    """

    crop: Array
    flip: Array
    rotation: Array

    def __post_init__(self) -> None:
        """Raise ValueError unless the arrays are (B, 4), (B,) and (B,)."""
        _require_shape("crop", self.crop, (len(self), 4))
        _require_shape("flip", self.flip, (len(self),))
        _require_shape("rotation", self.rotation, (len(self),))


_UNDONE: Any = None  # a missing column means: not applied


@dataclass(frozen=True, eq=False)
class Views(_Rows):
    """Everything applied to B images to make their target and source views.

    size: int64 (B, 2), width and height of the upright image in pixels. shared_geometry: both views start from one
    cropped image, and source_geometry is target_geometry. The columns of `CORRUPTIONS`, (B,), concern the source alone;
    a missing one (or None) means: not applied. grayscale: bool; blur_sigma: float32, in pixels, 0 for none;
    solarize_threshold: int64, 256 for none; compression_quality: int64, 101 for none.
    """

    size: Array
    target_geometry: Geometry
    source_geometry: Geometry
    target: Jitter
    source: Jitter
    shared_geometry: bool
    grayscale: Array = _UNDONE
    blur_sigma: Array = _UNDONE
    solarize_threshold: Array = _UNDONE
    compression_quality: Array = _UNDONE

    def __post_init__(self) -> None:
        """Raise ValueError where a part does not have B rows, or shared_geometry is wrong."""
        count = len(self)
        _require_shape("size", self.size, (count, 2))
        for corruption in CORRUPTIONS:
            if getattr(self, corruption.column) is None:
                undone = np.full(count, corruption.none, corruption.dtype)
                object.__setattr__(self, corruption.column, undone)
            _require_shape(corruption.column, getattr(self, corruption.column), (count,))
        for name in ("target_geometry", "source_geometry", "target", "source"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows; size has {count}")
        if self.shared_geometry and self.source_geometry is not self.target_geometry:
            raise ValueError("shared_geometry is True, so source_geometry must be the same object as target_geometry")

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenate one or more; ValueError where some share their geometry and some do not."""
        if len({part.shared_geometry for part in parts}) != 1:
            raise ValueError("parts must not be empty, and all or none of them must have shared_geometry")
        return super().concatenate(parts)

    def _columnwise(self, column: Callable[[str], Any]) -> Self:
        """A shared geometry stays shared."""
        made = {field.name: column(field.name) for field in fields(self) if field.name != "shared_geometry"}
        if self.shared_geometry:
            made["source_geometry"] = made["target_geometry"]
        return replace(self, **made)

    def uncorrupted(self) -> Self:
        """Return the same geometry and jitter without corruptions."""
        undone: dict[str, Any] = dict.fromkeys(corruption.column for corruption in CORRUPTIONS)
        return replace(self, **undone)

    def corrupted(self, corruption: Corruption, value: float | Array) -> Self:
        """Return the same views with one corruption's column set to a value, or to values (B,)."""
        column: Any = np.full(len(self), value, corruption.dtype)
        return replace(self, **{corruption.column: column})

    @staticmethod
    def neutral(size: Array, crop: Array) -> Views:
        """Return clean views: size (B, 2), crop (B, 4), nothing else applied; target and source are the same."""
        count = len(size)
        geometry = Geometry(np.asarray(crop, np.int64), np.zeros(count, bool), np.zeros(count, np.int64))
        still = Jitter.neutral(count)
        return Views(np.asarray(size, np.int64), geometry, geometry, still, still, shared_geometry=True)


def colour_matrix(jitter: Jitter) -> Floats:
    """Return the affine colour map of the jitter: float64 (B, 3, 4), for RGB levels 0 to 255.

    out = M[:, :, :3] @ rgb + M[:, :, 3], rounded and clipped once, with b, c, s the factors and h the hue angle: out =
    Q⁻¹ · R(h) · diag(1, s, s) · Q · (b·c) · in + 128·(1 - c)·b, Q the YIQ matrix. This is what DALI's `color_twist`
    computes (measured on 2.4: mean difference under 1e-4 of a level).
    """
    b, c, s, hue = (getattr(jitter, name).astype(np.float64) for name in JITTER)
    cos, sin = s * np.cos(np.radians(hue)), s * np.sin(np.radians(hue))
    turn = np.zeros((len(jitter), 3, 3))  # R(h) · diag(1, s, s)
    turn[:, 0, 0] = 1.0
    turn[:, 1, 1], turn[:, 1, 2] = cos, sin
    turn[:, 2, 1], turn[:, 2, 2] = -sin, cos
    matrix = np.empty((len(jitter), 3, 4))
    matrix[:, :, :3] = (_RGB @ turn @ _YIQ) * (b * c)[:, None, None]
    matrix[:, :, 3] = (128.0 * (1.0 - c) * b)[:, None]
    return matrix
