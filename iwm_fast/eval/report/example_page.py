"""The report's examples: the views that the world model ranks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from iwm_fast.actions.transforms import JITTER, component
from iwm_fast.eval.report.page import Picture
from iwm_fast.eval.world_model.examples import RankedExample, RankedView

__all__ = ["ExampleCard", "example_card"]


@dataclass(frozen=True)
class ExampleCard:
    """One image: the action in words, the rank of its view, and rows of pictures with their titles."""

    template: ClassVar[str] = "example.html"
    action: str
    place: str
    bank: int
    rows: Sequence[tuple[str, Sequence[Picture]]]


def example_card(example: RankedExample) -> ExampleCard:
    """Return a card with the correct view, and what the model and the controls rank first."""
    asked = (Picture.of(example.source, "source"), Picture.of(example.target, "correct view", asked=True))
    return ExampleCard(
        _told(example.action),
        _place(example.rank),
        example.bank,
        (
            ("Source and correct view", asked),
            ("Ranked by the world model", _views(example.ranked)),
            (f"Given another action: ranked {_place(example.rank_shuffled)}", _views(example.shuffled)),
            (f"Given no action: ranked {_place(example.rank_neutral)}", _views(example.neutral)),
        ),
    )


def _views(views: Sequence[RankedView]) -> list[Picture]:
    return [
        Picture.of(view.image, f"{view.place} · correct" if view.true else str(view.place), asked=view.true)
        for view in views
    ]


def _place(rank: float) -> str:
    return f"{rank:g}"


def _told(action: Mapping[str, float]) -> str:
    """Format an action: jitter with its units, a choice by its name, other components with their values."""
    if tuple(action) == JITTER:
        units = {name: component(name).unit for name in JITTER}
        words = ", ".join(
            f"{name} {value:+.0f}°" if units[name] == "degrees" else f"{name} ×{value:.2f}"
            for name, value in action.items()
        )
    elif list(action.values()) == [1.0]:
        words = f"action {next(iter(action))}"
    else:
        words = ", ".join(f"{name} {value:+.2f}" for name, value in action.items())
    return words.replace("-", "−")
