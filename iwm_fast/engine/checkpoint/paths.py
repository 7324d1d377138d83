"""Resolve a path to a run and a checkpoint.

A path may name a run by its folder, its ``checkpoints``, ``checkpoints/latest`` or one ``step_000123`` there, through
links, relative or absolute, with a trailing slash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from iwm_fast.engine.checkpoint.format import (
    INDEX,
    LATEST,
    MANIFEST,
    FileFault,
    damage,
    file_fault,
    newest,
    step_of,
    steps,
)
from iwm_fast.errors import UserError

__all__ = ["Named", "chosen_checkpoint", "named", "whole_checkpoint"]


@dataclass(frozen=True)
class Named:
    """A run's folder, and one of its checkpoints, or None for the newest."""

    run: Path
    checkpoint: Path | None = None

    @property
    def which(self) -> str:
        """``latest``, or the checkpoint's name."""
        return LATEST if self.checkpoint is None else self.checkpoint.name


def named(path: Path) -> Named:
    """Return what ``path`` names. A path that is no part of a run counts as the run's folder, which need not exist."""
    if _is_checkpoint(path):
        return Named(_run_above(path, 2), path.resolve() if path.is_symlink() else path)
    if path.name == LATEST and not path.is_dir():
        return Named(_run_above(path, 2))
    if path.is_dir() and not (path / "config.yaml").exists() and _holds_checkpoints(path):
        return Named(_run_above(path, 1))
    return Named(path)


def chosen_checkpoint(run: Path, which: str = LATEST) -> Named:
    """Return what RUN and ``--checkpoint`` name together.

    ``which``: latest, a name such as step_000500, or a path to a checkpoint of the run. Raises UserError where they
    contradict each other.
    """
    found = named(run)
    word = which.rstrip("/") or which
    if word == LATEST:
        return found
    own = found.run / "checkpoints" / word
    if "/" not in word and (own.exists() or not Path(word).exists()):
        asked = Named(found.run, own.resolve() if own.is_symlink() else own)
    else:
        asked = named(Path(word) if Path(word).exists() else found.run / word)
        if asked.run.resolve() != found.run.resolve():
            raise UserError(f"--checkpoint: {which}: is not of the run {found.run}; name its run, or a step_NNNNNN")
        asked = Named(found.run, asked.checkpoint)
    if None not in (found.checkpoint, asked.checkpoint) and found.which != asked.which:
        raise UserError(f"{run}: names {found.which}, and --checkpoint {asked.which}; name one of them")
    return asked


def whole_checkpoint(
    found: Named, say: Callable[[str], None] = lambda _line: None, fault: FileFault = file_fault
) -> Path:
    """Return the named checkpoint, or the newest intact one. Raises UserError where it is damaged, or there is none.

    ``say`` gets a line for each damaged one that was skipped. fault: as for `format.damage`.
    """
    if found.checkpoint is not None:
        if not found.checkpoint.is_dir():
            raise UserError(f"{found.checkpoint}: no such checkpoint; {_there(found.checkpoint.parent)}")
        wrong = damage(found.checkpoint, fault)
        if wrong:
            raise UserError(f"{found.checkpoint}: {wrong}; name another checkpoint")
        return found.checkpoint
    root = found.run / "checkpoints"
    newest_one, passed = newest(root, fault)
    for line in passed:
        say(f"skipped a damaged checkpoint: {line}")
    if newest_one is None:
        raise UserError(
            f"{root}: no whole checkpoint is left ({passed[0]}); restore one"
            if passed
            else f"{root}: no whole checkpoint; train the run first"
        )
    return newest_one


def _there(root: Path) -> str:
    found = sorted(path.name for path in steps(root))
    return f"there are {', '.join(found[-3:])}" if found else "name a run's folder, or a step_NNNNNN in its checkpoints"


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint, or has a name that only a checkpoint has."""
    if path.is_dir():
        if (path / "config.yaml").exists():  # a run's folder may have any name
            return False
        return (path / MANIFEST).exists() or (path / INDEX).exists() or step_of(path) is not None
    return step_of(path) is not None


def _holds_checkpoints(path: Path) -> bool:
    return (path / LATEST).is_file() or any(step_of(child) is not None for child in path.glob("step_*"))


def _run_above(path: Path, levels: int) -> Path:
    """The run that many levels up, along the path as written, else along its links."""
    written, real = _above(path, levels), _above(path.resolve(), levels)
    return real if not (written / "config.yaml").exists() and (real / "config.yaml").exists() else written


def _above(path: Path, levels: int) -> Path:
    """The folder that many levels up, as written where the path is long enough."""
    if len(path.parts) <= levels or ".." in path.parts[-levels:]:
        path = path.absolute().resolve()
    return path.parents[levels - 1]
