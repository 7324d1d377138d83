"""A run's folder: who may write to it, whether a start may go on from it, and what it says of itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.config import Config, dump_config, load_config
from iwm_fast.engine.metrics.log import metrics_record
from iwm_fast.errors import UserError, because
from iwm_fast.file_locks import hold

__all__ = ["RunDirectory", "run_config"]

# What may differ when a run is resumed: where this start ends, how the work is divided and computed (the results are
# equal to rounding), how long a fault is waited for, and what is saved, measured and logged.
FREE_KEYS = (
    "train.steps",
    "train.micro_batch",
    "train.max_skipped",
    "train.rank_timeout_s",
    "train.activation_checkpointing",
    "train.compile",
    "train.target_stream",
    "train.static_shapes",
    "train.static_multiple",
    "train.deterministic",
    "train.cuda_graph",
    "model.attention",
    "model.mlp_workspace_mib",
    "zero.stage",
    "data.threads",
    "data.readers",
    "data.checkers",
    "data.prefetch",
    "data.wait_s",
    "data.store_timeout",
    "data.store_attempts",
    "data.max_bad_fraction",
    "checkpoint.",
    "eval.",
    "log.",
)
# Where the data lie; `resuming.require_data` compares what lies there.
_PLACE_KEYS = ("data.root", "data.source")


class RunDirectory:
    """Names of the files in a run's folder, and the rules about them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.metrics_before = path / "metrics.before.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.stopped_file = path / "stopped"
        self.skipped_file = path / "skipped_steps.json"
        self.kernel_choices_file = path / "kernel_choices.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this job; a second live job gets a UserError.

        On a file system without locks the folder is not held, and a line says so.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except FileExistsError as error:
            link = self.path.is_symlink()
            what = f"a link to {self.path.readlink()}, which is not there" if link else "a file"
            raise UserError(f"{self.path}: is {what}; choose another --out") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({because(error, 'choose another --out')})") from error
        with lock:
            try:
                hold(lock, str(self.path))
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise UserError(
                    f"{self.path}: another live job ({holder}) holds it; wait for it or choose another --out"
                ) from error
            except OSError as error:
                raise UserError(f"{self.path}: cannot be locked ({because(error)})") from error
            try:
                lock.truncate(0)
                lock.write(f"pid {os.getpid()}")
                lock.flush()
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written to ({because(error)})") from error
            yield

    def begin(self, config: Config, environment: dict[str, Any]) -> None:
        """Write what describes the run."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.stopped_file.unlink(missing_ok=True)
        _replace(self.config_file, dump_config(config))
        _replace(self.environment_file, json.dumps(environment, indent=1) + "\n")

    def mark_stopped(self, step: int) -> None:
        """Leave word that the run was asked to stop before its end: a batch script then asks for another turn."""
        _replace(self.stopped_file, f"step {step}\n")

    def recorded(self) -> Config | None:
        """The configuration of the start before this one, None in a new run. A key that was not there yet has its
        default.
        """
        return run_config(self.config_file) if self.config_file.exists() else None

    def require_same(self, config: Config) -> None:
        """Raise UserError naming the first key that may not differ from the configuration the run was started with.

        The place of the data may (`resuming.require_data`).
        """
        # Loaded as a configuration, so that a key that was not there yet has its default.
        before = dict(_leaves(run_config(self.config_file).model_dump(mode="json")))
        now = dict(_leaves(config.model_dump(mode="json")))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not key.startswith((*FREE_KEYS, *_PLACE_KEYS)):
                raise UserError(
                    f"{self.config_file}: {key} was {before.get(key)} when the run began and is {now.get(key)} now; "
                    f"a resumed run keeps it (set it back, leave CONFIG out to take the run's, or start a new --out)"
                )

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines that a killed run logged after the checkpoint's step; earlier ones stay byte for byte.

        A line that cannot be read goes where nothing older follows it (a kill or a crash tore it), and stays elsewhere.
        Those of a run that begins again go to ``metrics.before.jsonl``, and a line says so.
        """
        if not self.metrics_file.exists():
            return
        if step == 0:
            self._set_metrics_aside()
            return
        lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        made = [record["step"] if (record := metrics_record(line)) else None for line in lines]
        end = max((place for place, at in enumerate(made) if at is not None and at <= step), default=-1)
        kept = [line for line, at in zip(lines[: end + 1], made, strict=False) if at is None or at <= step]
        _replace(self.metrics_file, b"".join(kept).decode(errors="surrogateescape"))

    def _set_metrics_aside(self) -> None:
        """Append the metrics to ``metrics.before.jsonl``: checkpoints that are gone may have been taken away."""
        try:
            lines = self.metrics_file.read_bytes()
            if lines:
                with self.metrics_before.open("ab") as file:
                    file.write(lines)
                print(
                    f"{self.checkpoints}: no checkpoint to resume from, so the run starts over; its metrics until now "
                    f"are in {self.metrics_before.name}",
                    file=sys.stderr,
                    flush=True,
                )
            self.metrics_file.unlink()
        except OSError as error:
            raise UserError(f"{self.metrics_file}: cannot be set aside ({because(error)})") from error


def run_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """A run's recorded configuration with ``overrides``. UserError where nothing is in its file: that of a user may be
    empty, a run's never is.
    """
    if file.is_file() and not file.read_bytes().strip(b" \0\r\n"):
        raise UserError(
            f"{file}: is empty, so the run's settings are unknown: restore it, or remove it and resume "
            "with the CONFIG that it was trained with"
        )
    return load_config(file, overrides)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _replace(path: Path, text: str) -> None:
    try:
        write_whole_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({because(error)})") from error
