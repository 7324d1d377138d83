"""The range of actions that a training sampled, and which parts of a given action are outside of it.

Legend: A components of an action vector, n actions.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.actions.ranges import corruptions_drawn, strength_range
from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import COMPONENTS, CORRUPTIONS
from iwm_fast.config import ActionsConfig
from iwm_fast.errors import UserError
from iwm_fast.eval.world_model.infer_action import Bounds, jitter_bounds

__all__ = ["at_bound", "checked_values", "search_box", "trained_box", "warn", "warn_outside"]

# Share of a component's range that float32 may be off by if a value combines two.
_SLACK = 1e-4
# Share of the searched width: nearer to an end counts as at the end.
_AT_END = 1e-3
_COMPONENTS = {component.name: component for component in COMPONENTS}


def trained_box(actions: ActionsConfig, space: ActionSpace) -> Bounds:
    """Return the lowest and highest action (A,) float32 that views of this configuration, or its manifest, can have.

    A crop's position depends on the images' shapes; its bound holds for images up to 4:1.
    """
    if isinstance(space, ExternalSpace):
        return _external_box(space)
    low, high = jitter_bounds(actions, space)
    for name, reach in _highest(actions).items():
        if name in space.slices:
            own = space.slices[name]
            high[own] = reach
            low[own] = -reach if name.startswith("crop_") else 0.0
    return low, high


def _external_box(space: ExternalSpace) -> Bounds:
    if space.external.kind == "discrete":
        return np.zeros(space.dim, np.float32), np.ones(space.dim, np.float32)
    ends = space.encode_values(np.array([space.external.low, space.external.high], np.float64))
    return ends[0], ends[1]


def _highest(actions: ActionsConfig) -> dict[str, float]:
    """Return the largest encoded value of each component, without the jitter's."""
    (scale_low, scale_high), (narrow, wide) = actions.crop_scale, actions.crop_aspect
    # Width and height are square roots of area times aspect and of area over aspect.
    ratio = 0.5 * math.log(scale_high * wide / (scale_low * narrow))
    smallest = math.sqrt(scale_low * min(narrow, 1 / wide)) / 2
    turned = float(actions.rotation_probability > 0)
    reached: dict[str, float] = {}
    for corruption in CORRUPTIONS:
        drawn = corruption in corruptions_drawn(actions)
        ends = np.array(strength_range(actions, corruption))
        for name, value in corruption.encoded(ends).items():
            reached[name] = float(value.max()) if drawn else 0.0
    return reached | {
        "crop_x": 1 / smallest,
        "crop_y": 1 / smallest,
        "crop_w": ratio,
        "crop_h": ratio,
        "flip": float(0 < actions.flip_probability < 1),
        "rotation_1": turned,
        "rotation_2": turned,
        "rotation_3": turned,
    }


def search_box(bounds: Mapping[str, tuple[float, float]] | None, actions: ActionsConfig, space: ActionSpace) -> Bounds:
    """Return lowest and highest action (A,) of `bounds`, (lowest, highest) physical values by name; others are neutral.

    None: the jitter that training sampled; for external actions, the manifest's ranges. Raise UserError for anything
    else.
    """
    if bounds is None:
        return trained_box(actions, space) if isinstance(space, ExternalSpace) else jitter_bounds(actions, space)
    if not isinstance(bounds, Mapping) or not bounds:
        raise UserError("bounds: give the components to search, as {'brightness': (-0.4, 0.4)}")
    for name, pair in bounds.items():
        try:
            low, high = (float(end) for end in pair)
        except (TypeError, ValueError) as error:
            raise UserError(f"bounds of {name} are {pair!r:.60}: give (lowest, highest)") from error
        if low > high:
            raise UserError(f"bounds of {name} are {low:g} and {high:g}: give the lowest first")
    ends = [space.vector(checked_values({n: pair[i] for n, pair in bounds.items()}, space)) for i in (0, 1)]
    return np.minimum(*ends), np.maximum(*ends)


def at_bound(action: NDArray[np.float32], box: Bounds, space: ActionSpace) -> tuple[str, ...]:
    """Return the components at an end of the searched box.

    Natural ends do not count, beyond which there is nothing: a flag's 0 and 1, a sigma of 0, the first and last level.
    """
    natural: dict[str, tuple[float, ...]] = {part.name: (0.0, 1.0) for part in space.components if part.unit == "flag"}
    natural |= {c.strength: c.natural for c in space.corruptions if c.strength is not None}
    found = []
    for name, value, low, high in zip(space.names, action, *box, strict=True):
        near = [end for end in (low, high) if abs(value - end) <= _AT_END * (high - low)] if high > low else []
        if any(min((abs(end - own) for own in natural.get(name, ())), default=1.0) > _AT_END for end in near):
            found.append(name)
    return tuple(found)


def checked_values(values: Mapping[Any, Any], space: ActionSpace) -> dict[str, float]:
    """Return physical values by name, each finite and possible for its component. Raise UserError for others."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if name not in space.names:
            raise UserError(f"action: {name!r}: no such component; choose from {', '.join(space.names)}")
        found[name] = _number(name, value)
        allowed = _impossible(name, found[name], space)
        if allowed:
            raise UserError(f"action: {name} is {found[name]:g}: {allowed}")
    _require_together(found, space)
    return found


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, of several elements
        raise UserError(f"action: {name} is {value!r:.60}; give one number") from error
    if not math.isfinite(number):
        raise UserError(f"action: {name} is {number}; give a finite number")
    return number


def _impossible(name: str, value: float, space: ActionSpace) -> str | None:
    """Return the component's possible values, if this is none of them."""
    if isinstance(space, ExternalSpace):
        choice = space.external.kind == "discrete" and value not in (0.0, 1.0)
        return "a choice is 1, and the others 0" if choice else None
    component = _COMPONENTS.get(name)
    if component is not None and component.unit == "flag" and value not in (0.0, 1.0):
        return "a flag is 0 or 1"
    strengths = {corruption.strength: corruption for corruption in CORRUPTIONS}
    if name in strengths and not strengths[name].lowest <= value <= strengths[name].highest:
        return strengths[name].rule
    return None


def _require_together(values: Mapping[str, float], space: ActionSpace) -> None:
    """Raise UserError for values that contradict each other, or a flag without the number for its strength."""
    if isinstance(space, ExternalSpace):
        chosen = [name for name, value in values.items() if value] if space.external.kind == "discrete" else []
        if len(chosen) > 1:
            raise UserError(f"action: {' and '.join(chosen)} are both chosen; choose one of {', '.join(space.names)}")
        return
    turns = [name for name in ("rotation_1", "rotation_2", "rotation_3") if values.get(name)]
    if len(turns) > 1:
        raise UserError(f"action: {' and '.join(turns)} are both 1; set one of them: a view is turned once")
    for corruption in space.corruptions:
        flag, number = corruption.name, corruption.strength
        if number is None or flag not in values:
            continue
        strong = values.get(number, corruption.none) != corruption.none
        if bool(values[flag]) != strong:
            why = f"give {number} too" if values[flag] else f"{number} is {values.get(number):g}"
            raise UserError(f"action: {flag} is {values[flag]:g}: {why}")


def _told(action: NDArray[np.float32], space: ActionSpace) -> dict[str, float]:
    """Return physical values by name of one action (A,), not rounded: a flag that is half on is 0.5."""
    decoded = {name: value[0] for name, value in space.decode(action[None]).items()}
    return {
        name: float(action[space.names.index(name)] if isinstance(value, np.bool_) else value)
        for name, value in decoded.items()
    }


def warn_outside(rows: NDArray[np.float32], actions: ActionsConfig, space: ActionSpace) -> None:
    """Raise UserError for `rows` (n, A) that are not finite; warn once of components outside training's range.

    Such a prediction extrapolates.
    """
    names = space.names
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        where = f" of action {row}" if len(rows) > 1 else ""
        raise UserError(f"action: {names[column]}{where} is {rows[row, column]}; give finite numbers")
    low, high = trained_box(actions, space)
    outside = (rows < low - _SLACK) | (rows > high + _SLACK)
    if not outside.any():
        return
    ends = [_told(end, space) for end in (low, high)]
    said = []
    for column in np.flatnonzero(outside.any(axis=0)):
        name, row = names[column], int(np.flatnonzero(outside[:, column])[0])
        value = _told(rows[row], space)[name]
        if low[column] == high[column]:
            said.append(f"{name} {value:.4g}, which never varied")
        else:
            said.append(f"{name} {value:.4g}, not in {_span(name, ends)}")
    warn(f"action outside of training's range, so the prediction extrapolates: {'; '.join(said)}")


def _span(name: str, ends: list[dict[str, float]]) -> str:
    first, last = sorted(end[name] for end in ends)
    component = _COMPONENTS.get(name.removeprefix("source_").removeprefix("target_"))
    unit = f" {component.unit}" if component is not None and component.unit != "flag" else ""
    return f"{first:.4g} to {last:.4g}{unit}"


def warn(message: str) -> None:
    """Warn at the caller's line, outside of this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("iwm_fast.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
