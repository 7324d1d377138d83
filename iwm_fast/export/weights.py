"""Weights for others: both encoders and the predictor as safetensors, with a JSON of what each file holds.

| file | holds | layout |
|---|---|---|
| encoder.safetensors | context encoder, which the predictor reads | iwm-fast's |
| target_encoder.safetensors | target encoder, the EMA of it (absent where the target is shared) | iwm-fast's |
| predictor.safetensors | predictor, the world model | iwm-fast's |
| context_encoder_timm.safetensors | context encoder | timm's VisionTransformer |
| target_encoder_timm.safetensors | target encoder (absent where the target is shared) | timm's |
| encoder_timm.safetensors | the encoder that evaluation reads: the target encoder where there is one | timm's |
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iwm_fast.atomic_files import whole_folder
from iwm_fast.engine.checkpoint.load import EXPORT_FILE, EXPORT_SCHEMA, find_checkpoint, load_model
from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.environment import environment
from iwm_fast.export.onnx import OPSET, write_onnx
from iwm_fast.export.timm_names import timm_arguments, to_timm
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_new_folder, writing

__all__ = ["export_run"]

_HOLDS = {
    "context": "context encoder: trained by gradients, its tokens are what the predictor reads",
    "target": "target encoder: the EMA of the context encoder, its tokens are what predictions are compared with",
    "predictor": "predictor: the world model, from the context encoder's tokens and an action to the target's tokens",
}
_TOKENS = "none: one token per patch, after the last normalisation"
_MEAN = "mean of all patch tokens after the last normalisation (timm's global_pool avg); forward_features: the tokens"


def export_run(run: Path, out: Path, which: str = "latest", *, onnx: bool = False) -> Path:
    """Write the files of the table above and config.json into the new folder ``out``; return it.

    config.json says under ``files`` what each file holds, its layout, dtype and pooling, and whether evaluation (k-NN,
    probes, finetuning) reads it. The timm files load into timm's VisionTransformer built with the arguments under
    ``timm``. ``onnx``: also write graphs on whole images (`onnx`). The folder appears whole or not at all.
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
        "input": "RGB in [0, 1], normalised with ImageNet's mean and std",
        "evaluated_encoder": "target" if model.target_encoder is not None else "context",
    }
    with writing(out), whole_folder(out) as partial:
        files = _write_weights(model, config.model.grid, partial)
        if onnx:
            graphs = write_onnx(model, partial)
            described["onnx"] = {"opset": OPSET, "input": "uint8 RGB (batch, side, side, 3)", **graphs}
            files |= {graphs[part]: _graph_entry(part, model) for part in graphs}
        described["files"] = files
        (partial / EXPORT_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return out


def _write_weights(model: IWM, grid: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Write every .safetensors; return what each holds, by file name."""
    evaluated = "target" if model.target_encoder is not None else "context"
    encoders = {"context": model.encoder} | ({"target": model.target_encoder} if model.target_encoder else {})
    files: dict[str, dict[str, Any]] = {}

    def write(name: str, state: Mapping[str, Tensor], part: str, layout: str, pooling: str) -> None:
        write_tensors(folder / name, state)
        files[name] = _entry(part, layout, pooling, evaluated=part == evaluated)
        files[name]["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")

    for part, module in encoders.items():
        state = module.state_dict()
        own_name = "encoder.safetensors" if part == "context" else "target_encoder.safetensors"
        write(own_name, state, part, "iwm-fast", _TOKENS)
        write(f"{part}_encoder_timm.safetensors", to_timm(state, grid), part, "timm", _MEAN)
    write("predictor.safetensors", model.predictor.state_dict(), "predictor", "iwm-fast", _TOKENS)
    same = f"{evaluated}_encoder_timm.safetensors"
    _same_file(folder / same, folder / "encoder_timm.safetensors")
    files["encoder_timm.safetensors"] = files[same] | {"same_as": same}
    return files


def _entry(part: str, layout: str, pooling: str, *, evaluated: bool) -> dict[str, Any]:
    return {"part": part, "holds": _HOLDS[part], "layout": layout, "pooling": pooling, "evaluated": evaluated}


def _graph_entry(part: str, model: IWM) -> dict[str, Any]:
    """What a graph of `write_onnx` holds; its parts are encoder, target_encoder and predictor."""
    short = {"encoder": "context", "target_encoder": "target"}.get(part, part)
    evaluated = short == ("target" if model.target_encoder is not None else "context")
    return _entry(short, "onnx", _TOKENS, evaluated=evaluated) | {"dtype": "float32"}


def _same_file(path: Path, other: Path) -> None:
    """Give a file a second name, by a hard link where the disk has them, else by a copy."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
