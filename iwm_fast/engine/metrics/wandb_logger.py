"""Weights & Biases, where log.wandb is set."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from typing import Any

from iwm_fast.errors import UserError
from iwm_fast.file_names import valid_unicode

__all__ = ["WandbSink", "require_wandb"]


def require_wandb() -> None:
    """Raise UserError if the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "log.wandb is set, but the package is not installed: pip install 'iwm-fast[wandb]', or unset log.wandb"
        )


class WandbSink:
    """Send every record to a run of the project; a resumed training resumes its W&B run.

    W&B's environment variables apply: WANDB_MODE=offline writes only below ``directory``/wandb.
    """

    where = "W&B (log.wandb)"

    def __init__(self, project: str, directory: Path, config: dict[str, Any]) -> None:
        require_wandb()
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        remembered = directory / ".wandb_run"
        if not remembered.exists():
            remembered.write_text(uuid.uuid4().hex)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=valid_unicode(directory.resolve().name),
                id=remembered.read_text().strip(),
                resume="allow",
                dir=str(directory),
                config=config,
            )
        except wandb.Error as error:
            raise UserError(
                f"log.wandb: {' '.join(str(error).split())}; log in, set WANDB_MODE=offline, or unset log.wandb"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Log one step's numbers."""
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish sending."""
        self._run.finish()
