"""Compare two results of one benchmark: which rows became slower or faster by more than the noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from iwm_fast.errors import UserError
from iwm_fast.measure.stats import ratio_of

__all__ = ["AT_LEAST", "Change", "compare", "compare_files"]

# Smaller changes are not judged: clocks, page cache and memory placement alone move a run by this share.
AT_LEAST = 0.03
# Environment fields of a result; a difference in one can explain a change.
_MADE_WITH = ("cpu", "cores", "gpus", "python", "packages", "commit")


@dataclass(frozen=True)
class Change:
    """One row that both results have: median time after over before, its 99 % interval, and the verdict."""

    name: str
    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    verdict: str


def compare_files(before: Path, after: Path, at_least: float = AT_LEAST) -> dict[str, Any]:
    """`compare` two JSON files. Raise UserError if one is not a benchmark's result, or if their kinds differ."""
    return compare(_read(before), _read(after), at_least)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], at_least: float = AT_LEAST) -> dict[str, Any]:
    """Compare rows of the same name by the ratio of their median seconds.

    "slower": the whole 99 % interval is above 1 + `at_least`; "faster": below its inverse; else "same".

    Returns:
        {rows: [Change as a mapping], only_before, only_after: names, made_with: {what: [before, after]} that differ}.

    Raises:
        UserError: the results are of different kinds, or have no row in common.

    """
    if before.get("schema") != after.get("schema"):
        raise UserError(
            f"cannot compare a result of {before.get('schema')} with one of {after.get('schema')}: "
            "give two results of the same benchmark"
        )
    ours, theirs = _samples(before), _samples(after)
    common = [name for name in ours if name in theirs]
    if not common:
        raise UserError("the results have no timed row in common: compare runs of the same benchmark and preset")
    rows = [asdict(_change(name, ours[name], theirs[name], at_least)) for name in common]
    old, new = before.get("environment", {}), after.get("environment", {})
    return {
        "kind": before.get("schema"),
        "at_least": at_least,
        "rows": rows,
        "only_before": [name for name in ours if name not in theirs],
        "only_after": [name for name in theirs if name not in ours],
        "made_with": {key: [old.get(key), new.get(key)] for key in _MADE_WITH if old.get(key) != new.get(key)},
    }


def _change(name: str, before: list[float], after: list[float], at_least: float) -> Change:
    ratio = ratio_of(after, before)
    verdict = "same"
    if ratio.low > 1 + at_least:
        verdict = "slower"
    elif ratio.high < 1 / (1 + at_least):
        verdict = "faster"
    return Change(name, median(before), median(after), ratio.value, ratio.low, ratio.high, verdict)


def _samples(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """Times by row name; rows without a name (kernels) are named by case, contender and pass."""
    found = {}
    for row in document.get("rows", []):
        seconds = row.get("seconds")
        if isinstance(seconds, dict):  # benchmarks.peers: iwm-fast's times
            seconds = seconds.get("ours")
        if isinstance(seconds, list) and seconds:
            name = row.get("name") or " ".join([*map(str, row["case"].values()), row["contender"], row["passes"]])
            found[name] = [float(value) for value in seconds]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; give a file written by iwm-fast bench --json") from error
    if not isinstance(document, dict) or "rows" not in document:
        raise UserError(f"{path}: not a benchmark's result; give a file written by iwm-fast bench --json")
    return document
