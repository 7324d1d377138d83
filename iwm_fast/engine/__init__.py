"""The engine: training loop on DeepSpeed, schedules, EMA, checkpoints, metrics."""

from iwm_fast.engine.checkpoint.load import load_export, load_model
from iwm_fast.engine.train import pretrain

__all__ = ["load_export", "load_model", "pretrain"]
