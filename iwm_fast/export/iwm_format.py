"""The format that `iwm_fast.load` opens: weights in its layout, and the encoders in timm's.

| file | holds | layout |
|---|---|---|
| encoder.safetensors | context encoder, which the predictor reads | iwm-fast's |
| target_encoder.safetensors | target encoder (absent where the target is shared) | iwm-fast's |
| predictor.safetensors | predictor, the world model | iwm-fast's |
| context_encoder_timm.safetensors | context encoder | timm's |
| target_encoder_timm.safetensors | target encoder (absent where the target is shared) | timm's |
| encoder_timm.safetensors | the encoder that evaluation reads: the target encoder where there is one | timm's |

config.json says under ``files`` what each holds. The timm files load into the model of timm that the arguments under
``timm`` build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwm_fast.engine.checkpoint.load import EXPORT_FILE
from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.export.described import PIXELS, TOKENS, Trained, write_json
from iwm_fast.export.graph_formats import add_onnx
from iwm_fast.export.timm_format import timm_entries, write_timm_files

__all__ = ["write_iwm"]

_OWN_NAMES = {"context": "encoder.safetensors", "target": "target_encoder.safetensors"}


def write_iwm(trained: Trained, folder: Path, *, onnx: bool = False) -> None:
    """Write the files of the module's table and config.json; with ``onnx`` graphs too."""
    described = trained.described() | timm_entries(trained)
    described |= {"input": PIXELS, "evaluated_encoder": trained.evaluated}
    described["files"] = _write_weights(trained, folder) | write_timm_files(trained, folder)
    if onnx:
        add_onnx(trained, folder, described)
    write_json(folder / EXPORT_FILE, described)


def _write_weights(trained: Trained, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the files in our layout; return what each holds, by file name."""
    files: dict[str, dict[str, Any]] = {}
    for part, encoder in trained.encoders.items():
        write_tensors(folder / _OWN_NAMES[part], encoder.state_dict())
        files[_OWN_NAMES[part]] = trained.file_entry(part, "iwm-fast", TOKENS)
    write_tensors(folder / "predictor.safetensors", trained.model.predictor.state_dict())
    files["predictor.safetensors"] = trained.file_entry("predictor", "iwm-fast", TOKENS)
    return files
