"""A run's folder: its lock, its files, and whether a launch may resume it."""

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
from iwm_fast.config.load import plugins_of
from iwm_fast.engine.metrics.log import metrics_record
from iwm_fast.errors import UserError, because
from iwm_fast.file_locks import hold

__all__ = ["RunDirectory", "run_config"]

# Keys that may change in a resumed run: where it stops, how the work is sharded and computed (results are equal up to
# rounding), time-outs, and what is saved, measured and logged.
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
    "zero.hpz_partition_size",
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
# The place of the data; `resuming.require_data` compares the files.
_PLACE_KEYS = ("data.root", "data.source")


class RunDirectory:
    """The files of a run's folder, and the rules about them."""

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
        self.initial_weights_file = path / "initial_weights.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this job; a second live job gets a UserError.

        On a file system without locks it is not locked, and a line says so.
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
        """Write the files that describe the run."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.stopped_file.unlink(missing_ok=True)
        _replace(self.config_file, dump_config(config))
        _replace(self.environment_file, json.dumps(environment, indent=1) + "\n")

    def mark_stopped(self, step: int) -> None:
        """Mark that the run was asked to stop early: a batch script then requeues it."""
        _replace(self.stopped_file, f"step {step}\n")

    def recorded(self) -> Config | None:
        """Return the configuration of the previous launch, None in a new run. A missing key has its default."""
        return run_config(self.config_file) if self.config_file.exists() else None

    def require_same(self, config: Config) -> None:
        """Raise UserError with the first key that must not differ from the run's configuration.

        The place of the data may (`resuming.require_data`).
        """
        for words in self._changes(config):
            raise UserError(
                f"{words}; a resumed run keeps it (set it back, leave CONFIG out to take the run's, or start a new "
                "--out)"
            )

    def require_same_training(self, config: Config) -> None:
        """Raise UserError with the first key of the section train that must not differ in a new run which resumes a
        checkpoint of this one: moments, schedules and counts of samples are its optimizer's and its batch's.
        """
        for words in self._changes(config, "train."):
            raise UserError(
                f"{words}; its checkpoint resumes with it (set it back, leave CONFIG out to take the run's, or begin "
                f"from its weights alone: model.init={self.path})"
            )

    def _changes(self, config: Config, section: str = "") -> Iterator[str]:
        """Yield each key that differs from the run's and is not free to, in words."""
        # Loaded as a configuration, so that missing keys have their defaults.
        before = dict(_leaves(run_config(self.config_file).model_dump(mode="json")))
        now = dict(_leaves(config.model_dump(mode="json")))
        for key in sorted(before.keys() | now.keys()):
            free = not key.startswith(section) or key.startswith((*FREE_KEYS, *_PLACE_KEYS))
            if before.get(key) != now.get(key) and not free:
                yield f"{self.config_file}: {key} was {before.get(key)} when the run began and is {now.get(key)} now"

    def drop_metrics_after(self, step: int) -> None:
        """Drop the lines that a killed run logged after the checkpoint's step; earlier ones stay byte for byte.

        An unreadable line is dropped where no older one follows it (a kill or a crash damaged it), and stays elsewhere.
        Those of a run that starts over move to ``metrics.before.jsonl``, and a line says so.
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
        """Append the metrics to ``metrics.before.jsonl``: somebody may have moved the checkpoints away."""
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
    """Return a run's recorded configuration with ``overrides``. Raises UserError where its file is empty, which a
    user's may be but a run's never is.
    """
    if file.is_file() and not file.read_bytes().strip(b" \0\r\n"):
        raise UserError(
            f"{file}: is empty, so the run's settings are unknown: restore it, or remove it and resume "
            "with the CONFIG that it was trained with"
        )
    if plugins_of(overrides):
        load_config(file)  # imports the run's own plugins, which the override replaces
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
