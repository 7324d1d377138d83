"""The model that a run trains, and its requirements of the machine."""

from __future__ import annotations

import os
import shutil

import torch

from iwm_fast.config import Config
from iwm_fast.engine.determinism import require_deterministic
from iwm_fast.engine.distributed.sums import sum_over_ranks
from iwm_fast.engine.graphs import require_graphs
from iwm_fast.errors import UserError
from iwm_fast.models.attention import require_attention
from iwm_fast.models.compiled_regions import compile_regions
from iwm_fast.models.cuda_stream import SideStream
from iwm_fast.models.fp8 import require_fp8
from iwm_fast.models.iwm import IWM

__all__ = ["require_machine", "trained_model"]


def require_machine(config: Config, device: torch.device) -> None:
    """Raise UserError where this machine cannot run the configuration."""
    if config.model.target_precision == "fp8":
        require_fp8(device)
    require_attention(config.model.attention, device.type, config.train.precision)
    require_deterministic(config)
    if config.train.target_stream and device.type != "cuda":
        raise UserError(f"train.target_stream needs a GPU; this rank computes on {device.type}: set it to false")
    require_graphs(config, device)
    if config.train.compile and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "train.compile needs a C++ compiler on a CPU: install g++, name another in CXX, or set it to false"
        )


def trained_model(config: Config, action_dim: int, device: torch.device) -> IWM:
    """Return the configuration's model on the device, initialised from the seed; compiled, and with a target stream, if
    set.

    Raises UserError as `require_machine`.
    """
    require_machine(config, device)
    torch.manual_seed(config.train.seed)
    model = IWM(config.model, action_dim, activation_checkpointing=config.train.activation_checkpointing).to(device)
    model.sum_over_ranks = sum_over_ranks
    if config.train.compile:
        compile_regions(model)
    if config.train.target_stream:
        model.target_stream = SideStream(device)
    return model
