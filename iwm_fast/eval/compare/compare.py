"""A comparison as tables, JSON and an offline page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.eval.compare.curves import Axis, axis_of, charts
from iwm_fast.eval.compare.figures import Figure, Row, differences, measured_rows, notes
from iwm_fast.eval.compare.subjects import Subject, read_subjects
from iwm_fast.eval.report.page import Charts, Section, Table, document
from iwm_fast.file_names import printable
from iwm_fast.outputs import require_folder, writing

__all__ = ["Comparison", "compare", "write_page"]

_RULE = (
    "Against the first run measured on the same images. Higher, lower: the 95 % intervals do not overlap. Within: "
    "they do, so the difference may be noise. Intervals are over images, not over seeds: train several for that."
)


@dataclass(frozen=True)
class Comparison:
    """The result. axis: of the curves."""

    subjects: Sequence[Subject]
    rows: Sequence[Row]
    axis: Axis

    def document(self) -> dict[str, Any]:
        """Return the result for JSON."""
        names = [subject.name for subject in self.subjects]
        return {
            "runs": [_facts(subject) for subject in self.subjects],
            "differences": {
                key: dict(zip(names, values, strict=True)) for key, values in differences(self.subjects).items()
            },
            "measures": [
                {
                    "measure": row.measure,
                    "data": row.data,
                    "values": {
                        name: None if figure is None else asdict(figure)
                        for name, figure in zip(names, row.figures, strict=True)
                    },
                    "verdicts": dict(zip(names, row.verdicts, strict=True)),
                }
                for row in self.rows
            ],
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Return the limits of the comparison."""
        return notes(self.subjects, self.rows)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return (title, head, rows) of the runs, of the settings that differ, and of the measures."""
        names = [subject.name for subject in self.subjects]
        found = [("runs", ["", "kind", "state", "step", "images seen", "loss", "RankMe", "images/s"], self._runs())]
        differ = [[key, *map(_setting, values)] for key, values in differences(self.subjects).items()]
        if differ:
            found.append(("settings that differ", ["key", *names], differ))
        places = _short_places(self.rows)
        if self.rows:
            # A run without measures would be a column of dashes.
            shown = [place for place in range(len(names)) if any(row.figures[place] is not None for row in self.rows)]
            measured = [
                [
                    row.measure + (f", on {places[row.data]}" if len(places) > 1 else ""),
                    *_cells(row, self.subjects, shown),
                ]
                for row in self.rows
            ]
            found.append(("measured: value (95 % interval)", ["", *(names[place] for place in shown)], measured))
        return found

    def _runs(self) -> list[list[str]]:
        rows = []
        for subject in self.subjects:
            facts = _facts(subject)
            of = f" of {subject.of:,}" if subject.of else ""
            rows.append([
                subject.name, subject.kind, subject.state, "" if subject.step is None else f"{subject.step:,}{of}",
                *(_number(facts[key], form) for key, form in
                  (("images_seen", ",.0f"), ("loss", ".4f"), ("rank_me", ".1f"), ("images_per_s", ",.0f"))),
            ])  # fmt: skip
        return rows


def compare(paths: Sequence[Path], axis: Axis | None = None) -> Comparison:
    """Read and compare the runs. Raises UserError as `read_subjects`."""
    subjects = read_subjects(paths)
    return Comparison(subjects, measured_rows(subjects), axis_of(subjects, axis))


def write_page(found: Comparison, out: Path) -> Path:
    """Write OUT/index.html and return its path. Raise UserError if it cannot be written."""
    require_folder(out)
    runs, *others = found.tables()
    drawn = charts(found.subjects, found.axis)
    sections = [Section("Runs", [_table(runs)], found.notes())]
    sections += [Section("Curves", [Charts(drawn)])] if drawn else []
    for title, head, rows in others:
        measured = title.startswith("measured")
        lines = [_RULE, *_places(found.rows)] if measured else []
        sections.append(Section(title[0].upper() + title[1:], [_table((title, head, rows))], lines))
    name = " and ".join(subject.name for subject in found.subjects)
    page = document(f"Comparison: {name}", "Comparison", name, [], sections)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_whole_text(out / "index.html", page)
    return out / "index.html"


def _table(parts: tuple[str, list[str], list[list[str]]]) -> Table:
    _, head, rows = parts
    return Table([printable(cell) for cell in head], [[printable(cell) for cell in row] for row in rows])


def _places(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(row.data for row in rows if row.data)
    return [f"Measured on: {'; '.join(map(printable, found))}."] if found else []


def _short_places(rows: Sequence[Row]) -> dict[str, str]:
    """Return the last part of each data path, or all of it if two end alike."""
    places = dict.fromkeys(row.data for row in rows)
    ends = [PurePath(place).name for place in places]
    return {place: end if end and ends.count(end) == 1 else place for place, end in zip(places, ends, strict=True)}


def _facts(subject: Subject) -> dict[str, Any]:
    """Return a run's last metrics; images/s is the median."""

    def last(key: str) -> float | None:
        return next((r[key] for r in reversed(subject.records) if isinstance(r.get(key), int | float)), None)

    speeds = sorted(r["images_per_s"] for r in subject.records if isinstance(r.get("images_per_s"), int | float))
    return {
        "name": subject.name,
        "path": str(subject.path),
        "kind": subject.kind,
        "state": subject.state,
        "step": subject.step,
        "steps": subject.of,
        "images_seen": last("samples_seen"),
        "loss": last("loss"),
        "rank_me": last("rank_me"),
        "images_per_s": speeds[len(speeds) // 2] if speeds else None,
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _setting(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cells(row: Row, subjects: Sequence[Subject], shown: Sequence[int]) -> list[str]:
    return [_cell(row.figures[place], row.verdicts[place], subjects[place]) for place in shown]


def _cell(figure: Figure | None, verdict: str, subject: Subject) -> str:
    """Return value, interval and verdict, and the step if it is not the run's newest."""
    if figure is None:
        return "–"
    ends = f" ({figure.interval[0]:.4f} – {figure.interval[1]:.4f})" if figure.interval else ""
    older = figure.step is not None and figure.step != subject.step
    step = f", step {figure.step:,}" if older else ""
    return f"{figure.value:.4f}{ends}{step}{f', {verdict}' if verdict else ''}"
