"""What an evaluation opens: a run with its checkpoint, or an export, which has one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.load import (
    export_config,
    export_environment,
    export_weights,
    find_checkpoint,
    is_export,
    load_export,
    load_model,
    records_evaluation,
)
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint
from iwm_fast.engine.provenance import recorded_environment
from iwm_fast.engine.run_directory import RunDirectory, run_config
from iwm_fast.errors import UserError
from iwm_fast.eval.measurements import weights_of
from iwm_fast.eval.report.report import read_metrics
from iwm_fast.models.iwm import IWM

__all__ = ["OpenedExport", "OpenedRun", "opened"]


class OpenedRun:
    """A run and its chosen checkpoint."""

    def __init__(self, run: Path, checkpoint: str) -> None:
        self._chosen = chosen_checkpoint(run, checkpoint)
        self.folder = self._chosen.run
        file = self.folder / "config.yaml"
        # Errors in a folder without this file are raised when its weights are needed.
        self.external = file.exists() and run_config(file).actions.is_external

    def require_weights(self) -> None:
        """Raise UserError where there is no intact checkpoint."""
        self._checkpoint = find_checkpoint(self.folder, self._chosen.which)
        self._weights = weights_of(self._checkpoint)  # now: a training may remove it meanwhile

    def load(self, overrides: Sequence[str]) -> tuple[IWM, Config, ActionSpace, int]:
        """Return (model, configuration, action space, steps done)."""
        return load_model(self.folder, self._checkpoint.name, overrides)

    def weights(self) -> str:
        """Return the digest that names the weights in results."""
        return self._weights

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of the training."""
        return read_metrics(self.folder / "metrics.jsonl")

    def environment(self) -> Mapping[str, Any]:
        """Return what the run was trained with."""
        return recorded_environment(RunDirectory(self.folder).environment_file)

    @contextmanager
    def cache(self, given: Path | None) -> Iterator[Path]:
        """Yield the folder of cached features."""
        yield given if given is not None else self.folder / "cache"


class OpenedExport:
    """An export in this project's format. It has no training curves, and caches features in a temporary folder: what
    is in it is to be handed on.
    """

    def __init__(self, folder: Path, checkpoint: str) -> None:
        if checkpoint != "latest":
            raise UserError(f"{folder}: an export has one checkpoint; leave out --checkpoint")
        self.folder = folder
        self.external = export_config(folder).actions.is_external
        self._recorded = records_evaluation(folder)

    def require_weights(self) -> None:
        """Do nothing: `load` reads them at once."""

    def load(self, overrides: Sequence[str]) -> tuple[IWM, Config, ActionSpace, int]:
        """Return (model, configuration, action space, steps done)."""
        model, config, space, step = load_export(self.folder)
        print(f"{self.folder}: an export; its report has no training curves, which the run has", file=sys.stderr)
        if not self._recorded:
            print(
                f"{self.folder}: written by an earlier version: the untrained network has the seed 0, and banks their "
                "default size, unless overridden; export the run again for the run's own",
                file=sys.stderr,
            )
        return model, export_config(self.folder, overrides) if overrides else config, space, step

    def weights(self) -> str:
        """Return the digest that names the weights in results."""
        return export_weights(self.folder)

    def metrics(self) -> list[dict[str, Any]]:
        """Return no records."""
        return []

    def environment(self) -> Mapping[str, Any]:
        """Return what the export was written with."""
        return export_environment(self.folder)

    @contextmanager
    def cache(self, given: Path | None) -> Iterator[Path]:
        """Yield the folder of cached features."""
        if given is not None:
            yield given
            return
        with tempfile.TemporaryDirectory(prefix="iwm-fast-cache-") as folder:
            yield Path(folder)


def opened(run: Path, checkpoint: str) -> OpenedRun | OpenedExport:
    """Open a run or an export. Raises UserError for a checkpoint that an export cannot have."""
    return OpenedExport(run, checkpoint) if is_export(run) else OpenedRun(run, checkpoint)
