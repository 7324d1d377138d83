"""Read what is compared from its folder, without weights: a run, an export or a finetuned result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iwm_fast.config.batch import training_steps
from iwm_fast.engine.checkpoint.format import step_of, steps
from iwm_fast.engine.checkpoint.load import EXPORT_FILE, FINETUNED_FILE
from iwm_fast.engine.checkpoint.paths import named
from iwm_fast.engine.provenance import recorded_launch
from iwm_fast.engine.run_directory import RunDirectory, run_config
from iwm_fast.errors import UserError, because
from iwm_fast.eval.measurements import Measurement, place_of, read
from iwm_fast.eval.report.report import read_metrics
from iwm_fast.file_locks import hold

__all__ = ["Subject", "read_subjects", "tasks_of"]

# The settings of a finetuned result, not its scores.
_FINETUNE_KEYS = ("mode", "init", "task", "encoder", "lr", "steps", "batch", "weight_decay", "seed", "step")


@dataclass(frozen=True)
class Subject:
    """A run, an export or a finetuned result.

    name: unique. kind: run, export or finetuned. settings: by dotted key. records: of metrics.jsonl. measured: of
    RUN/results, or of the export's. step, of: steps done, and steps in all (None: unknown). state: finished, training,
    stopped or ended early; "" if it has none.
    """

    name: str
    path: Path
    kind: str
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = ()
    measured: Sequence[Measurement] = ()
    step: int | None = None
    of: int | None = None
    state: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)


def read_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Read the subjects in order. Raise UserError for fewer than two, a repeated one, and a folder that is none."""
    if len(paths) < 2:
        raise UserError("compare: give two or more runs, exports or finetuned results: iwm-fast compare runs/a runs/b")
    for path in paths:
        if named(path).checkpoint is not None:
            raise UserError(f"{path}: a checkpoint cannot be compared, only its run: give {named(path).run}")
    folders = [named(path).run for path in paths]
    for place, folder in enumerate(folders):
        if not folder.is_dir():
            raise UserError(f"{paths[place]}: no such folder; name a run, an export or a finetuned result")
        if any(folder.samefile(other) for other in folders[:place]):
            raise UserError(f"{paths[place]}: given twice; name each run once")
    return [_read(name, folder) for name, folder in zip(_names(folders), folders, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are unique."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read(name: str, folder: Path) -> Subject:
    if (folder / "config.yaml").is_file():
        return _run(name, folder)
    if (folder / FINETUNED_FILE).is_file():
        return _finetuned(name, folder)
    if (folder / EXPORT_FILE).is_file():
        found = _json(folder / EXPORT_FILE)
        settings = {key: found.get(key, {}) for key in ("model", "actions")}
        settings["actions"] = {key: value for key, value in settings["actions"].items() if key != "names"}
        return Subject(name, folder, "export", dict(_leaves(settings)), measured=read(folder), step=found.get("step"))
    raise UserError(
        f"{folder}: no run (no config.yaml), no export ({EXPORT_FILE}) and no finetuned result ({FINETUNED_FILE})"
    )


def _run(name: str, folder: Path) -> Subject:
    directory = RunDirectory(folder)
    config = run_config(directory.config_file)
    records = read_metrics(directory.metrics_file)
    launch = recorded_launch(directory.environment_file)
    settings = dict(_leaves(config.model_dump(mode="json")))
    settings |= {f"({key})": launch[key] for key in ("images", "world", "version") if key in launch}
    total = launch.get("steps", {}).get("train.steps") or config.train.steps
    if total is None and "images" in launch:
        total = training_steps(config, launch["images"])
    if total is None:
        total = config.train.schedule_steps
    saved = [step for path in steps(directory.checkpoints) if (step := step_of(path)) is not None]
    done = max([*saved, *(record["step"] for record in records)], default=0)
    measured = read(folder)
    return Subject(name, folder, "run", settings, records, measured, done, total, _state(directory, done, total))


def _state(directory: RunDirectory, done: int, total: int | None) -> str:
    """Return the state: training while a job holds the lock, else how it ended."""
    try:
        with (directory.path / ".lock").open("rb") as lock:
            hold(lock, str(directory.path))
    except BlockingIOError:
        return "training"
    except OSError:  # another user's, or missing: unknown
        pass
    if total is not None and done >= total:
        return "finished"
    return "stopped" if directory.stopped_file.exists() else "ended early"


def _finetuned(name: str, folder: Path) -> Subject:
    found = _json(folder / FINETUNED_FILE)
    results = found.get("results", {})
    settings = dict(_leaves({"model": found.get("model", {})}))
    settings |= {f"finetune.{key}": results.get(key) for key in _FINETUNE_KEYS}
    return Subject(name, folder, "finetuned", settings, results=results, step=results.get("steps"))


def tasks_of(subject: Subject) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (task, path of its test images, its results) of a finetuned result; a single task has the name ""."""
    tasks = subject.results.get("tasks")
    for task, found in tasks.items() if isinstance(tasks, dict) else [("", subject.results)]:
        place = (found.get("splits") or subject.results.get("splits") or {}).get("test", "")
        yield task, place_of(place) if place else "", found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({because(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged; write it again with iwm-fast export or finetune") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a mapping; write it again with iwm-fast export or finetune")
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
