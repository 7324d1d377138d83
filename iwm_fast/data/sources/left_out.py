"""What a source leaves out, counted by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from iwm_fast.data.sources.names import escape

__all__ = ["LeftOut", "some"]

_NAMED = 3


@dataclass
class LeftOut:
    """Counts by reason, with the first names of each. A reason is a noun: "links to what their shard does not hold"."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, *names: str) -> None:
        """Count one for each name."""
        if names:
            self.counts[reason] = self.counts.get(reason, 0) + len(names)
            known = self.examples.setdefault(reason, [])
            known += names[: _NAMED - len(known)]

    def merge(self, other: LeftOut) -> None:
        """Count all of another's."""
        for reason, count in other.counts.items():
            self.add(reason, *other.examples[reason])
            self.counts[reason] += count - len(other.examples[reason])

    def rows(self) -> list[dict[str, object]]:
        """For JSON: {count, reason, examples} for each reason."""
        return [
            {"count": count, "reason": reason, "examples": self.examples[reason]}
            for reason, count in self.counts.items()
        ]

    def line(self) -> str:
        """One line: each count, its reason and the first names."""
        parts = []
        for reason, count in self.counts.items():
            parts.append(f"{count} {reason} ({some(self.examples[reason], count)})")
        return "; ".join(parts)


def some(names: Iterable[str], count: int) -> str:
    """The first names of `count`, on one line."""
    shown = [escape(name) for name in names][:_NAMED]
    return ", ".join(shown) + (", …" if count > len(shown) else "")
