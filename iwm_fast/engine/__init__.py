"""The engine: DeepSpeed loop, schedules, moving average, checkpoints, metrics."""

from iwm_fast.engine.checkpoint.load import load_export, load_model
from iwm_fast.engine.train import pretrain
from iwm_fast.export.weights import export_run

__all__ = ["export_run", "load_export", "load_model", "pretrain"]
