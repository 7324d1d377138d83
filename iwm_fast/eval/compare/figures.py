"""Differences of runs: their settings, and measures beyond their intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iwm_fast.eval.compare.subjects import Subject, tasks_of
from iwm_fast.eval.measurements import Measurement, merged
from iwm_fast.eval.report.drawing import drawings

__all__ = ["Figure", "Row", "differences", "measured_rows", "notes"]

# Settings that define the pretraining task: losses of different tasks cannot be compared.
_OF_THE_TASK = (
    "data.root", "views.", "masks.", "actions.", "model.target", "model.freeze_encoder",
    "model.normalize_target", "model.patch",
)  # fmt: skip
# What an evaluation's result depends on beside weights and place of the images.
_CONDITION = re.compile(r"(train|test)_images|\w+_(bank|images|queries|k|temperature)")
# Without training images: what is ranked are views of test images.
_OF_TEST_IMAGES = ("mrr", "rollout")


@dataclass(frozen=True)
class Figure:
    """A measured number, its 95 % interval, the step of the checkpoint, and the numbers that it was measured with."""

    value: float
    interval: tuple[float, float] | None
    step: int | None
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measure on one data set: the figure of each subject, None if it was not measured.

    verdicts: of each subject against the first measured one, "" for that one: higher or lower if the intervals do not
    overlap, within if they do, no interval; measured otherwise: with other numbers of images, say.
    """

    measure: str
    data: str
    figures: Sequence[Figure | None]
    verdicts: Sequence[str]


def differences(subjects: Sequence[Subject]) -> dict[str, list[Any]]:
    """Return the settings that differ, by key: a value per subject, None also if a subject has no such setting."""
    keys = dict.fromkeys(key for subject in subjects for key in subject.settings)
    found: dict[str, list[Any]] = {}
    for key in keys:
        there = [subject.settings[key] for subject in subjects if key in subject.settings]
        if any(value != there[0] for value in there):
            found[key] = [subject.settings.get(key) for subject in subjects]
    return found


def measured_rows(subjects: Sequence[Subject]) -> list[Row]:
    """Return a row per measure and data set, first those that most subjects have."""
    found: dict[tuple[str, str], list[Figure | None]] = {}
    for place, subject in enumerate(subjects):
        for measure, data, figure in _figures(subject):
            found.setdefault((measure, data), [None] * len(subjects))[place] = figure
    rows = [Row(measure, data, figures, _verdicts(figures)) for (measure, data), figures in found.items()]
    return sorted(rows, key=lambda row: row.figures.count(None))


def _figures(subject: Subject) -> Iterator[tuple[str, str, Figure]]:
    """Yield (name, data path, figure), of the newest checkpoint that was measured."""
    for place in dict.fromkeys(one.data for one in subject.measured):
        own = [one for one in subject.measured if one.data == place]
        step: dict[str, int] = {}
        for one in own:
            step[one.measure] = max(step.get(one.measure, 0), one.step)
        newest = [one for one in own if one.step == step[one.measure]]
        for drawing in drawings():
            results = merged([one for one in newest if one.measure in drawing.names])
            at = max((step[name] for name in drawing.names if name in step), default=None)
            for figure in drawing.figures(results):
                key = figure.name + figure.end
                if key in results:
                    measure = next(one for one in newest if key in one.results)
                    yield key, place, _figure(results, key, step.get(figure.name, at), _conditions(measure, key))
    if subject.kind == "finetuned":
        for task, place, found in tasks_of(subject):
            for key in ("top1", "top5", "miou"):
                if key in found:
                    yield f"finetuned {key}{f', {task}' if task else ''}", place, _figure(found, key, subject.step)


def _figure(
    results: Mapping[str, Any], key: str, step: int | None, conditions: Mapping[str, Any] | None = None
) -> Figure:
    ends = results.get(f"{key}_interval")
    return Figure(float(results[key]), (float(ends[0]), float(ends[1])) if ends else None, step, conditions or {})


def _conditions(measured: Measurement, key: str) -> dict[str, Any]:
    return {
        name: value
        for name, value in measured.results.items()
        if _CONDITION.fullmatch(name)
        and ("component" in name) <= ("component" in key)
        and not (name == "train_images" and measured.measure in _OF_TEST_IMAGES)
    }


def _verdicts(figures: Sequence[Figure | None]) -> list[str]:
    first = next(figure for figure in figures if figure is not None)
    return ["" if figure is None or figure is first else _verdict(first, figure) for figure in figures]


def _verdict(first: Figure, other: Figure) -> str:
    if first.conditions != other.conditions:
        return "measured otherwise"
    if first.interval is None or other.interval is None:
        return "no interval"
    if other.interval[0] > first.interval[1]:
        return "higher"
    return "lower" if other.interval[1] < first.interval[0] else "within"


def notes(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    """Return the limits of the comparison, one line each."""
    differ = differences(subjects)
    runs = [subject for subject in subjects if subject.kind == "run"]
    said = [line for subject in subjects if (line := _state_line(subject))]
    of_the_task = [key for key in differ if key.startswith(_OF_THE_TASK)] if len(runs) > 1 else []
    if any(run.settings.get("model.freeze_encoder") and run.settings.get("model.target") == "shared" for run in runs):
        of_the_task += [key for key in differ if key == "model.init"]  # a frozen encoder is the target
    if of_the_task:
        said.append(f"the losses are of different tasks ({', '.join(of_the_task[:4])} differ): compare the measures")
    seen = {subject.name: _seen(subject) for subject in runs if subject.records}
    if len(set(seen.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in seen.items())
        said.append(f"the runs have seen different numbers of images: {shown}")
    said += _other_conditions(subjects, rows)
    if rows and not any(row.figures.count(None) <= len(subjects) - 2 for row in rows):
        said.append("no two of them were evaluated on the same images: evaluate them with the same --data")
    return said


def _other_conditions(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    """Say once for each condition which subjects were measured with which."""
    found: dict[str, None] = {}
    for row in rows:
        if "measured otherwise" not in row.verdicts:
            continue
        measured = [(one.name, figure.conditions) for one, figure in zip(subjects, row.figures, strict=True) if figure]
        for name in dict.fromkeys(name for _, conditions in measured for name in conditions):
            values = [conditions.get(name) for _, conditions in measured]
            if any(value != values[0] for value in values):
                shown = ", ".join(f"{who} {value}" for (who, _), value in zip(measured, values, strict=True))
                found[f"measured otherwise: {name} is {shown}; evaluate them alike"] = None
    return list(found)


def _seen(subject: Subject) -> int:
    return int(max((record.get("samples_seen") or 0 for record in subject.records), default=0))


def _state_line(subject: Subject) -> str:
    if subject.kind == "export":
        evaluated = "" if subject.measured else f", and was not evaluated (iwm-fast evaluate {subject.path} --data ...)"
        return f"{subject.name}: an export has no curves{evaluated}; name its run for these"
    lacks = [] if subject.records or subject.kind != "run" else ["has logged no metrics"]
    if subject.kind == "run" and not subject.measured:
        lacks.append(f"was not evaluated (iwm-fast evaluate {subject.path} --data ...)")
    if subject.state == "training":
        lacks.insert(0, "is still training")
    elif subject.state in ("stopped", "ended early"):
        lacks.insert(0, f"{subject.state} at step {subject.step:,}" + (f" of {subject.of:,}" if subject.of else ""))
    return f"{subject.name}: {'; '.join(lacks)}" if lacks else ""
