"""What a source leaves out, counted by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from iwm_fast.data.sources.kinds import EXTENSIONS, type_of
from iwm_fast.data.sources.names import escape

__all__ = ["SKIPPED", "LeftOut", "some"]

SKIPPED = "file(s) of a type that is not read"
_NAMED = 3
_TYPES = 6  # named; the others are counted together


@dataclass
class LeftOut:
    """Counts by reason, with the first names of each. A reason is a noun: "links to files outside their shard".

    types: of some reasons, the same counts by what the names end in.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    types: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, reason: str, *names: str) -> None:
        """Count one for each name."""
        if names:
            self.counts[reason] = self.counts.get(reason, 0) + len(names)
            known = self.examples.setdefault(reason, [])
            known += names[: _NAMED - len(known)]

    def add_by_type(self, reason: str, *names: str) -> None:
        """Count one for each name, and by type."""
        self.add(reason, *names)
        for name in names:
            types = self.types.setdefault(reason, {})
            types[type_of(name)] = types.get(type_of(name), 0) + 1

    def merge(self, other: LeftOut) -> None:
        """Count all of another's."""
        for reason, count in other.counts.items():
            self.add(reason, *other.examples[reason])
            self.counts[reason] += count - len(other.examples[reason])
        for reason, types in other.types.items():
            known = self.types.setdefault(reason, {})
            for kind, count in types.items():
                known[kind] = known.get(kind, 0) + count

    def rows(self) -> list[dict[str, object]]:
        """For JSON: {count, reason, examples} for each reason, with types where they are counted."""
        return [
            {"count": count, "reason": reason, "examples": self.examples[reason]}
            | ({"types": _by_number(self.types[reason])} if reason in self.types else {})
            for reason, count in self.counts.items()
        ]

    def line(self) -> str:
        """One line: each count but of SKIPPED, its reason, its types and the first names; "" where there is none."""
        parts = []
        for reason, count in self.counts.items():
            if reason != SKIPPED:
                types = f": {self.types_line(reason)}" if reason in self.types else ""
                parts.append(f"{count} {reason}{types} ({some(self.examples[reason], count)})")
        return "; ".join(parts)

    def skipped_line(self) -> str:
        """One line: how many files of which types are not read, and which types are; "" where there are none."""
        count = self.counts.get(SKIPPED, 0)
        if not count:
            return ""
        files = "file" if count == 1 else "files"
        return f"skipped {count} {files}: {self.types_line(SKIPPED)} (read: {', '.join(sorted(EXTENSIONS))})"

    def types_line(self, reason: str) -> str:
        """The types of a reason with their counts, the most frequent first."""
        types = _by_number(self.types[reason])
        named = [f"{count} {escape(kind)}" for kind, count in list(types.items())[:_TYPES]]
        others = list(types.values())[_TYPES:]
        return ", ".join([*named, f"{sum(others)} of {len(others)} other types"] if others else named)


def _by_number(types: dict[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(types.items(), key=lambda item: (-item[1], item[0])))


def some(names: Iterable[str], count: int) -> str:
    """The first names of `count`, on one line."""
    shown = [escape(name) for name in names][:_NAMED]
    return ", ".join(shown) + (", …" if count > len(shown) else "")
