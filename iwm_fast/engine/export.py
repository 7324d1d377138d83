"""Weights for others: encoder, target encoder and predictor as safetensors, with a JSON of what they are."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from iwm_fast.data.whole import whole_folder
from iwm_fast.engine.loading import EXPORT_FILE, EXPORT_SCHEMA, find_checkpoint, load_model
from iwm_fast.engine.onnx_export import OPSET, write_onnx
from iwm_fast.models.export_names import timm_arguments, to_timm
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_new_folder
from iwm_fast.planning.environment import environment

__all__ = ["export_run"]


def export_run(run: Path, out: Path, which: str = "latest", *, onnx: bool = False) -> Path:
    """Write ``encoder``, ``target_encoder`` (when it is its own), ``predictor`` and ``encoder_timm`` .safetensors
    and config.json.

    ``encoder_timm.safetensors`` loads into timm's VisionTransformer built with the arguments under ``timm`` in
    config.json; it holds the weights that the paper evaluates: the target encoder's where there is one. ``onnx``: also
    graphs of whole images (`onnx_export`). The folder appears whole or not at all.
    """
    require_new_folder(out)
    checkpoint = find_checkpoint(run, which)
    model, config, space, step = load_model(run, checkpoint.name)
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
    with whole_folder(out) as partial:
        _write_weights(model, config.model.grid, partial)
        if onnx:
            graphs = write_onnx(model, partial)
            described["onnx"] = {"opset": OPSET, "input": "uint8 RGB (batch, side, side, 3)", **graphs}
        (partial / EXPORT_FILE).write_text(json.dumps(described, indent=1) + "\n")
    return out


def _write_weights(model: IWM, grid: int, folder: Path) -> None:
    parts = {"encoder": model.encoder, "target_encoder": model.target_encoder, "predictor": model.predictor}
    states = {name: module.state_dict() for name, module in parts.items() if module is not None}
    states["encoder_timm"] = to_timm(states.get("target_encoder", states["encoder"]), grid)
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
