"""Evaluations of a run on disk: RUN/results has one JSON document per checkpoint, evaluation and data.

So the report shows yesterday's MRR beside today's k-NN. Repeating an evaluation of the same checkpoint on the same data
replaces its document only. Documents are written atomically, so evaluations may run concurrently.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.engine.checkpoint.format import MANIFEST
from iwm_fast.engine.provenance import recorded_starts
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.environment import environment
from iwm_fast.eval.registry import evaluations, names
from iwm_fast.results import json_text

__all__ = ["FOLDER", "Measurement", "divide", "keep", "merged", "place_of", "read", "weights_of"]

FOLDER = "results"
_OF_THE_CALL = ("not_run", "step", "report", "not_by_default")


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one checkpoint.

    ``weights``: a digest of the checkpoint. ``data``: `place_of` the images. ``date``: ISO 8601 in UTC. ``results``:
    names and values from the evaluation, its protocol included.
    """

    step: int
    weights: str
    measure: str
    data: str
    date: str
    results: Mapping[str, Any]


def place_of(data: str | Path) -> str:
    """Return the data's name, independent of the working folder."""
    return str(data) if is_address(str(data)) else str(Path(data).resolve())


def weights_of(checkpoint: Path) -> str:
    """Return a digest of a checkpoint; a new training in the same folder has another one."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]


def divide(results: Mapping[str, Any], *, step: int, weights: str, data: str | Path) -> list[Measurement]:
    """Split an evaluation's ``results`` into measurements, dated now."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    owners = {key: _owner(key) for key in results if key not in _OF_THE_CALL}
    return [
        Measurement(
            step, weights, measure, place_of(data), date,
            {key: results[key] for key, owner in owners.items() if owner in (measure, None)},
        )
        for measure in names()
        if measure in results
    ]  # fmt: skip


def keep(run: Path, measurements: Sequence[Measurement]) -> None:
    """Write one document for each into RUN/results."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    for one in measurements:
        data = hashlib.sha256(one.data.encode(errors="surrogateescape")).hexdigest()[:8]
        name = f"step_{one.step:06d}-{one.weights[:8]}-{one.measure}-{data}.json"
        document = {"schema": "iwm-fast-measurement/1", "environment": environment(), **asdict(one)}
        write_whole_text(run / FOLDER / name, json_text(document))


def read(run: Path) -> list[Measurement]:
    """Return all measurements of the run's training, oldest first.

    Left out, and said: other and unreadable files, and measurements of weights that a later launch trained anew, from
    an earlier step or from none.
    """
    found, starts = [], recorded_starts(RunDirectory(run).environment_file)
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found.append(Measurement(**{name: document[name] for name in Measurement.__dataclass_fields__}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = " ".join(str(error).split())
            print(f"{path}: left out of the report: not a measurement ({why})", file=sys.stderr, flush=True)
    kept = [one for one in found if not any(date > one.date and step < max(1, one.step) for date, step in starts)]
    dead = len(found) - len(kept)
    if dead:
        why = "of weights that were trained anew since"
        print(f"{run / FOLDER}: {dead} measurement(s) left out: {why}", file=sys.stderr, flush=True)
    return sorted(kept, key=lambda one: (one.date, one.step))


def merged(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return names and values of all, as from one evaluation; of two with the same name, the later one's.

    ``reduced`` has the entries of every evaluation, each from its own measurement.
    """
    results: dict[str, Any] = {}
    reduced: dict[str, Any] = {}
    for one in measurements:
        results |= one.results
        entries = one.results.get("reduced", {}).items()
        reduced |= {name: entry for name, entry in entries if _owner(name) in (one.measure, None)}
    return results | ({"reduced": reduced} if reduced else {})


def _owner(key: str) -> str | None:
    """Return the evaluation that owns a name; None for names about the data, which belong to every one."""
    return next((one.name for one in evaluations() if one.owns(key)), None)
