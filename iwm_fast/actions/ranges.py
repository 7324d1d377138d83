"""What a configuration draws of the table: which jitter varies, what is done to sources, and within which values."""

from __future__ import annotations

from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Corruption, component
from iwm_fast.config.schema import ActionsConfig

__all__ = ["corruptions_drawn", "jitter_range", "strength_range", "varying"]


def varying(actions: ActionsConfig) -> list[str]:
    """The jitter components that the configuration lets vary; without one there is no bank."""
    return [name for name in JITTER if actions.strength * getattr(actions, name) > 0]


def jitter_range(actions: ActionsConfig, name: str) -> tuple[float, float]:
    """The lowest and highest value of one view's jitter component: factors from 0 on, or at most half a turn each way.

    As torchvision's `ColorJitter`, with a factor's reach, or the hue's in turns, times `actions.strength`.
    """
    reach = getattr(actions, name) * actions.strength
    if component(name).unit == "degrees":
        degrees = 360.0 * min(reach, 0.5)
        return -degrees, degrees
    return max(0.0, 1.0 - reach), 1.0 + reach


def corruptions_drawn(actions: ActionsConfig) -> list[Corruption]:
    """What is done to sources with a chance above 0."""
    return [
        corruption
        for corruption in CORRUPTIONS
        if corruption.group in actions.groups and getattr(actions, f"{corruption.name}_probability") > 0
    ]


def strength_range(actions: ActionsConfig, corruption: Corruption) -> tuple[float, float]:
    """The values of the column that are drawn where it is done: both 1 for one that is only done or not."""
    if corruption.strength is None:
        return 1.0, 1.0
    drawn = getattr(actions, corruption.strength)
    return drawn if isinstance(drawn, tuple) else (drawn, drawn)
