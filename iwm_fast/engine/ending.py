"""What a training leaves behind: where its results are, and the commands that come next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from iwm_fast.config import Config
from iwm_fast.data.split_layout import find_layout
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError

__all__ = ["Ending", "resume_command"]


@dataclass(frozen=True)
class Ending:
    """How a launch ended: after ``step``, of ``stop_at`` planned. ``first``: whether this is the first rank."""

    config: Config
    out: Path
    step: int
    stop_at: int
    first: bool

    @property
    def finished(self) -> bool:
        """Whether all steps are done; otherwise the log has said how to resume."""
        return self.step >= self.stop_at

    def lines(self) -> list[str]:
        """Where the results are, and what to type next."""
        directory = RunDirectory(self.out)
        return [
            f"run: {self.out}, {self.step:,} steps",
            f"checkpoint: {directory.checkpoints / f'step_{self.step:06d}'}",
            f"metrics: {directory.metrics_file}",
            f"next: {_command('evaluate', str(self.out), '--data', _data(self.config))}",
            f"weights: {_command('export', str(self.out), '--out', str(_export_place(self.out, self.step)))}",
        ]


def resume_command(out: Path, world: int) -> str:
    """The command that resumes a run with its own configuration."""
    command = _command("pretrain", "--out", str(out), "--resume", "auto")
    return command if world == 1 else f"{command} (under the launcher that started this run)"


def _command(*words: str) -> str:
    return shlex.join(["iwm-fast", *words])


def _data(config: Config) -> str:
    """What ``evaluate --data`` gets: eval.root, or the folder that holds the training images and those to test on, or
    the data themselves.
    """
    root = config.data.root or ""
    if config.eval.root is not None:
        return str(config.eval.root)
    if config.actions.is_external or "://" in str(root):
        return str(root)
    parent = Path(root).parent
    try:
        layout = find_layout(parent)
    except (UserError, OSError):  # no set of splits; evaluate divides the images itself
        return str(root)
    if layout.given and Path(layout.train).resolve() == Path(root).resolve():
        return str(parent)
    return str(root)


def _export_place(out: Path, step: int) -> Path:
    """A folder that does not exist yet."""
    wanted = Path("weights") / (out.name or "run")
    return wanted if not wanted.exists() else wanted.with_name(f"{wanted.name}-step{step}")
