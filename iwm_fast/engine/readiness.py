"""Check before the first step what training needs later, when a failure would cost the steps until then."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

from torch import nn

from iwm_fast.config import Config
from iwm_fast.engine.evaluator import Evaluator
from iwm_fast.engine.metrics.prometheus import require_prometheus
from iwm_fast.engine.metrics.wandb_logger import require_wandb
from iwm_fast.engine.optimizer import MOMENTS
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError
from iwm_fast.outputs import unwritable

__all__ = ["require_ready", "require_room"]


def require_ready(config: Config, directory: RunDirectory, evaluator: Evaluator | None) -> None:
    """Raise UserError where the images of eval.root, a folder of the run or a metrics sink is unavailable.

    Reports what the evaluator will not measure. The first rank calls it while it holds the run.
    """
    for key, root in (("data.root", config.data.root), ("eval.root", config.eval.root)):
        if root is not None and Path(root).resolve() == directory.path.resolve():
            raise UserError(
                f"--out: {directory.path}: is {key} too, and a run would lie among the images; choose another"
            )
    for folder in (directory.path, directory.checkpoints, *([directory.tensorboard] if config.log.tensorboard else [])):
        why = unwritable(folder)
        if why is not None:
            raise UserError(f"{folder}: cannot be written: {why}; fix the folder, or choose another --out")
    _require_sinks(config)
    if config.eval.interval_key is None or evaluator is None:
        return
    try:
        left_out = evaluator.unmeasured(config)
    except UserError as error:
        raise UserError(f"eval.root: {error}") from error
    if left_out is not None:
        print(f"eval.root: {left_out}", file=sys.stderr, flush=True)


def require_room(model: nn.Module, checkpoints: Path) -> None:
    """Raise UserError where the disk has no room for one checkpoint: fp32 weights, moments and EMA."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    needed = 4 * (trained * (1 + len(MOMENTS)) + frozen)
    free = shutil.disk_usage(checkpoints).free
    if free < needed:
        raise UserError(
            f"{checkpoints}: a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; "
            "free space, or choose another --out"
        )


def _require_sinks(config: Config) -> None:
    if config.log.wandb is not None:
        require_wandb()
    if config.log.prometheus_port is not None:
        require_prometheus()
    if config.log.prometheus_port:
        host, port = config.log.prometheus_host, config.log.prometheus_port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((host, port))
            except OSError as error:
                raise UserError(
                    f"log.prometheus_port: {host}:{port} cannot be opened ({error.strerror}); choose another port"
                ) from error
