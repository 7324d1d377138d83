"""A folder that `timm.create_model("local-dir:OUT", pretrained=True)` opens.

config.json and model.safetensors are as timm writes them to the Hub, with the encoder that evaluation reads. Beside
them each encoder has a file of its own, named as in the format iwm, with the arguments under ``timm`` in config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwm_fast.atomic_files import link_or_copy
from iwm_fast.engine.checkpoint.load import EXPORT_FILE
from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.export.described import PIXELS, Trained, write_json
from iwm_fast.export.timm_names import timm_arguments, to_timm

__all__ = ["timm_entries", "write_timm", "write_timm_files"]

_MEAN = "mean of all patch tokens after the last normalisation (timm's global_pool avg); forward_features: the tokens"
_SAME = "encoder_timm.safetensors"


def write_timm(trained: Trained, folder: Path) -> None:
    """Write config.json, model.safetensors and a file per encoder."""
    files = write_timm_files(trained, folder)
    link_or_copy(folder / _SAME, folder / "model.safetensors")
    files["model.safetensors"] = files[_SAME]
    arguments = timm_arguments(trained.encoders[trained.evaluated].architecture)
    about = arguments.pop("pretrained_cfg")
    eps = about.pop("norm_eps")  # an argument that JSON cannot hold: norm_layer
    side = arguments["img_size"]
    about |= {"input_size": [3, side, side], "fixed_input_size": True, "interpolation": "bilinear", "crop_pct": 1.0}
    about |= {"crop_mode": "center", "first_conv": "patch_embed.proj", "classifier": "head", "num_classes": 0}
    own = {
        "format": "timm",
        "input": PIXELS,
        "norm_eps": eps,
        "evaluated_encoder": trained.evaluated,
        **trained.described(),
    }
    document = {
        "architecture": about["architecture"],
        "num_classes": arguments.pop("num_classes"),
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": about,
        **timm_entries(trained),
        "files": files,
        "iwm_fast": own,
    }
    write_json(folder / EXPORT_FILE, document)


def timm_entries(trained: Trained) -> dict[str, Any]:
    """Return the arguments under ``timm``, of the encoder that evaluation reads; and by encoder where they differ."""
    each = {part: timm_arguments(encoder.architecture) for part, encoder in trained.encoders.items()}
    found: dict[str, Any] = {"timm": each[trained.evaluated]}
    return found | ({"timm_by_part": each} if any(one != found["timm"] for one in each.values()) else {})


def write_timm_files(trained: Trained, folder: Path) -> dict[str, dict[str, Any]]:
    """Write a file per encoder, and one name more for the one that evaluation reads; return what each holds."""
    files: dict[str, dict[str, Any]] = {}
    for part, encoder in trained.encoders.items():
        name = f"{part}_encoder_timm.safetensors"
        own = encoder.architecture
        write_tensors(folder / name, to_timm(encoder.state_dict(), own.grid, own.positions), {"format": "pt"})
        files[name] = trained.file_entry(part, "timm", _MEAN)
    same = f"{trained.evaluated}_encoder_timm.safetensors"
    link_or_copy(folder / same, folder / _SAME)
    files[_SAME] = files[same] | {"same_as": same}
    return files
