"""Sinks of records beside metrics.jsonl: TensorBoard, Weights & Biases, Prometheus, as configured."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from iwm_fast.config import Config
from iwm_fast.file_names import utf8_name

__all__ = ["Sink", "open_sinks"]


class Sink(Protocol):
    """Takes the record of each logged step."""

    where: str

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish."""


class _TensorBoard:
    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.where = f"{folder} (log.tensorboard)"
        self._name = ExitStack()  # open while files may be opened in the folder
        # What a killed run logged from this step on is not shown: it comes again.
        self._board: Any = SummaryWriter(self._name.enter_context(utf8_name(folder)), purge_step=first)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._board.close()
        self._name.close()


def open_sinks(config: Config, directory: Path, tensorboard: Path, first: int) -> list[Sink]:
    """Return the sinks of a run whose next step is ``first``, on the first rank only. Raises UserError where a
    configured one is unavailable.
    """
    log = config.log
    sinks: list[Sink] = []
    if log.wandb is not None:
        from iwm_fast.engine.metrics.wandb_logger import WandbSink

        sinks.append(WandbSink(log.wandb, directory, config.model_dump(mode="json")))
    if log.prometheus_port is not None:
        from iwm_fast.engine.metrics.prometheus import PrometheusSink

        sinks.append(PrometheusSink(log.prometheus_host, log.prometheus_port, str(directory)))
    if log.tensorboard:
        sinks.append(_TensorBoard(tensorboard, first))
    return sinks
