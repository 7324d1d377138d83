"""Weights for others: encoder, target encoder and predictor as safetensors, with a JSON of what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from iwm_fast.engine.loading import EXPORT_FILE, EXPORT_SCHEMA, find_checkpoint, load_model
from iwm_fast.errors import UserError
from iwm_fast.models.export_names import timm_arguments, to_timm
from iwm_fast.planning.environment import environment

__all__ = ["export_run"]


def export_run(run: Path, out: Path, which: str = "latest") -> Path:
    """Write ``encoder``, ``target_encoder`` (when it is its own), ``predictor`` and ``encoder_timm`` .safetensors
    and config.json.

    ``encoder_timm.safetensors`` loads into timm's VisionTransformer built with the arguments under ``timm`` in
    config.json; it holds the weights that the paper evaluates: the target encoder's where there is one. The folder
    appears whole or not at all.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out")
    checkpoint = find_checkpoint(run, which)
    model, config, space, step = load_model(run, checkpoint.name)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = {"encoder": model.encoder, "target_encoder": model.target_encoder, "predictor": model.predictor}
    for name, module in parts.items():
        if module is not None:
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, partial / f"{name}.safetensors")
    best = model.target_encoder if model.target_encoder is not None else model.encoder
    timm_state = to_timm(best.state_dict(), config.model.grid)
    save_file({k: v.contiguous() for k, v in timm_state.items()}, partial / "encoder_timm.safetensors")
    described = {
        "schema": EXPORT_SCHEMA,
        "environment": environment(),
        "checkpoint": checkpoint.name,
        "step": step,
        "model": config.model.model_dump(mode="json"),
        "actions": {**config.actions.model_dump(mode="json"), "names": list(space.names)},
        "timm": timm_arguments(config.model),
        "input": "RGB in [0, 1], normalised with ImageNet's mean and standard deviation",
    }
    (partial / EXPORT_FILE).write_text(json.dumps(described, indent=1) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(out)
    return out
