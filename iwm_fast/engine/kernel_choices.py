"""RUN/kernel_choices.json: the tuned block sizes of a run's kernels, the same on every rank and after a resume."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.engine.distributed.ranks import Ranks, decide, gather
from iwm_fast.errors import UserError, because
from iwm_fast.kernels import Adopted, read_adopted, run_choices

__all__ = ["KernelChoices", "Tables", "read_tables"]

SCHEMA = "iwm-fast-kernel-choices/1"
# By kind of device, then by the key of `kernels.RunChoices`.
Tables = dict[str, dict[str, Adopted]]


class KernelChoices:
    """The choices of a run, the first rank's on all ranks, and their file. tables: the file's at launch."""

    def __init__(self, ranks: Ranks, file: Path, tables: Tables) -> None:
        self._ranks, self._file, self._tables = ranks, file, tables
        self.choices = run_choices(ranks.device, tables)

    def news(self, step: int) -> str | None:
        """Return a line for a run that resumes after `step` steps without saved choices for this kind of
        device, or None.
        """
        if step == 0 or not self.choices.timed or self._tables.get(self.choices.name):
            return None
        others = f", only of {', '.join(sorted(self._tables))}" if self._tables else ""
        return (
            f"{self._file}: no block sizes of {self.choices.name}{others}: they are tuned again, and results "
            "equal those of the run before up to rounding"
        )

    def meet(self, step: int) -> None:
        """Tune what any rank lacks, on the first rank, and save it; all ranks call it, and use it from `step` on.

        Raises UserError on every rank where the file cannot be written.
        """
        noted = gather(self.choices.take_noted(), self._ranks.world, self._ranks.control)

        def answer() -> dict[str, Adopted]:
            found = self.choices.answer(noted, step)
            self._tables[self.choices.name] = self.choices.table | found
            _write(self._file, self._tables)  # before any step uses it
            return found

        self.choices.adopt(decide(self._ranks, answer))


def read_tables(file: Path, checkpoint: Path | None) -> Tables:
    """Read the choices in a run's file, or in that of the run whose checkpoint is resumed.

    A damaged file is reported and copied beside. Raises UserError where the file may not be read.
    """
    source = file
    if not file.exists() and checkpoint is not None:
        source = checkpoint.resolve().parents[1] / file.name
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({because(error)})") from error
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        _say(source, f"is damaged or of another kind{_aside(file, source)}: block sizes are tuned again")
        return {}
    tables, damaged = _tables(document.get("devices"))
    if damaged:
        kept = _aside(file, source)
        if source == file:
            _write(file, tables)
        _say(source, f"{damaged} damaged entries are left out{kept}: their block sizes are tuned again")
    return tables


def _tables(devices: Any) -> tuple[Tables, int]:
    """(valid entries, number of damaged ones)."""
    if not isinstance(devices, dict):
        return {}, 1
    tables: Tables = {}
    damaged = 0
    for device, entries in devices.items():
        if not isinstance(entries, dict):
            damaged += 1
            continue
        read = {key: read_adopted(entry) for key, entry in entries.items()}
        tables[device] = {key: adopted for key, adopted in read.items() if adopted is not None}
        damaged += len(read) - len(tables[device])
    return tables, damaged


def _aside(file: Path, source: Path) -> str:
    """Copy a run's own damaged file beside it and report it; another run's stays as it is."""
    if source != file:
        return ""
    number, aside = 1, file.with_name(f"{file.stem}.damaged.json")
    while aside.exists():
        number += 1
        aside = file.with_name(f"{file.stem}.damaged.{number}.json")
    try:
        shutil.copyfile(file, aside)
        _write(file, {})
    except OSError as error:
        raise UserError(f"{file}: is damaged and cannot be set aside ({because(error)})") from error
    return f", and kept in {aside.name}"


def _write(file: Path, tables: Mapping[str, Mapping[str, Adopted]]) -> None:
    devices = {
        device: {key: adopted.document() for key, adopted in sorted(table.items())} for device, table in tables.items()
    }
    try:
        write_whole_text(file, json.dumps({"schema": SCHEMA, "devices": devices}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({because(error)})") from error


def _say(file: Path, words: str) -> None:
    print(f"{file}: {words}", file=sys.stderr, flush=True)
