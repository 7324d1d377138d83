"""Record files that cannot be decoded: count them, list each once, and stop the run above a limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

from iwm_fast.errors import UserError

__all__ = ["BadSamples"]

FILE_NAME = "bad_samples.jsonl"
_NAMED = 10
# The limit is checked only after this many files, so that its message names more than the first bad one.
_AT_LEAST = 20


class BadSamples:
    """Bad files of a set of `total` files; more than `max_fraction` of them stop the run.

    With a `run_dir`, each is appended to its bad_samples.jsonl once ({file, reason, epoch, sample_id}): every rank
    appends to the same file and reads the others' lines, so that the limit holds for the whole set.
    """

    def __init__(self, total: int, max_fraction: float, run_dir: Path | None = None) -> None:
        self.total, self.max_fraction = total, max_fraction
        self._path = run_dir / FILE_NAME if run_dir is not None else None
        self._own: dict[str, str] = {}
        self._all: dict[str, str] = {}  # of this rank and of the others
        self._offset = 0
        self._earlier = set(self._new_lines())  # of earlier launches: neither written nor counted again
        if self._path is not None and self._path.exists() and self._path.stat().st_size > self._offset:
            os.truncate(self._path, self._offset)  # a kill of an earlier launch cut the last line
        self._tried: set[int] = set()

    def __len__(self) -> int:
        """The number of bad files that this rank met."""
        return len(self._own)

    def tried(self, files: list[int]) -> None:
        """Note that files were read, good or bad."""
        if len(self._tried) < _AT_LEAST:
            self._tried.update(files)

    def add(self, name: str, reason: str, epoch: int, sample_id: int) -> None:
        """Record a bad file by its full name, once."""
        if name in self._own:
            return
        self._own[name] = reason
        self._all.update(self._new_lines())
        known = name in self._all or name in self._earlier
        self._all[name] = reason
        if self._path is None or known:
            return
        line = json.dumps({"file": name, "reason": reason, "epoch": epoch, "sample_id": sample_id}) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # one write in append mode, so that ranks' lines do not mix
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)  # less the umask, as open() does
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def check(self) -> None:
        """Raise UserError where more than the allowed share of the files is bad."""
        if len(self._tried) >= min(_AT_LEAST, self.total) and len(self._all) > self.max_fraction * self.total:
            raise UserError(self._message(self._all))

    def all_bad(self) -> UserError:
        """Return the error for a set without a single decodable file."""
        return UserError(self._message(self._all))

    def _message(self, bad: dict[str, str]) -> str:
        first = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        return (
            f"{len(bad)} of {self.total} files cannot be decoded, more than data.max_bad_fraction "
            f"({self.max_fraction:g}) allows: {first}{more}. "
            "Mend or remove them (iwm-fast data verify finds them all), or raise the limit"
        )

    def _new_lines(self) -> dict[str, str]:
        """File and reason of the lines since the last call."""
        if self._path is None or not self._path.exists():
            return {}
        found = {}
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # another rank is still writing it
                self._offset += len(line)
                try:
                    entry = json.loads(line)
                    found[str(entry["file"])] = str(entry["reason"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut by a kill
        return found
