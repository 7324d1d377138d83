"""What a configuration samples of the action table: which jitter, which corruptions, in which ranges."""

from __future__ import annotations

from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Corruption, component
from iwm_fast.config.schema import ActionsConfig

__all__ = ["corruptions_drawn", "jitter_range", "strength_range", "varying"]


def varying(actions: ActionsConfig) -> list[str]:
    """Return the jitter components that vary; without one there is no bank."""
    return [name for name in JITTER if actions.strength * getattr(actions, name) > 0]


def jitter_range(actions: ActionsConfig, name: str) -> tuple[float, float]:
    """Return the lowest and highest value of one view's jitter component: a factor, or degrees up to half a turn.

    As torchvision's `ColorJitter`, with the factor's or hue's range times `actions.strength`.
    """
    reach = getattr(actions, name) * actions.strength
    if component(name).unit == "degrees":
        degrees = 360.0 * min(reach, 0.5)
        return -degrees, degrees
    return max(0.0, 1.0 - reach), 1.0 + reach


def corruptions_drawn(actions: ActionsConfig) -> list[Corruption]:
    """Return the corruptions of sources with a probability above 0."""
    return [
        corruption
        for corruption in CORRUPTIONS
        if corruption.group in actions.groups and getattr(actions, f"{corruption.name}_probability") > 0
    ]


def strength_range(actions: ActionsConfig, corruption: Corruption) -> tuple[float, float]:
    """Return the range of a corruption's column where it is applied; (1, 1) for one without a strength."""
    if corruption.strength is None:
        return 1.0, 1.0
    drawn = getattr(actions, corruption.strength)
    return drawn if isinstance(drawn, tuple) else (drawn, drawn)
