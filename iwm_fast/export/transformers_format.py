"""A folder that transformers' `AutoModel.from_pretrained` opens.

    OUT/config.json, model.safetensors, preprocessor_config.json    the encoder that evaluation reads
    OUT/context_encoder/… or target_encoder/…                       the other encoder, where there are two
    OUT/predictor/config.json, model.safetensors, …_predictor.py    the world model; needs trust_remote_code=True

The encoders are classes of transformers, without code of ours. Nothing here imports transformers.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.export.described import PIXELS, Trained, write_json
from iwm_fast.families.to_transformers import hub_class
from iwm_fast.models.blocks import NORM_EPS
from iwm_fast.models.predictors import VitPredictor
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["no_class", "write_transformers"]

_CODE = "modeling_iwm_predictor"
_BILINEAR = 2  # Pillow's number


def no_class(trained: Trained) -> str | None:
    """Return why transformers has no class for one of the encoders, or None."""
    for encoder in trained.encoders.values():
        found = hub_class(encoder.architecture)
        if isinstance(found, str):
            return found
    return None


def write_transformers(trained: Trained, folder: Path) -> None:
    """Write the files of the module's table. Every encoder must have a class (`no_class`)."""
    for name, encoder in trained.encoders.items():
        place = folder if name == trained.evaluated else folder / f"{name}_encoder"
        place.mkdir(exist_ok=True)
        hub = hub_class(encoder.architecture)
        assert not isinstance(hub, str)
        write_json(place / "config.json", {**hub.config(), "iwm_fast": _about(trained, name)})
        write_json(place / "preprocessor_config.json", _preprocessor(encoder.image))
        write_tensors(place / "model.safetensors", hub.weights(encoder.state_dict()), {"format": "pt"})
    _write_predictor(trained, folder / "predictor")


def _about(trained: Trained, part: str) -> dict[str, Any]:
    return {"format": "transformers", "part": part, "input": PIXELS, **trained.described()}


def _write_predictor(trained: Trained, folder: Path) -> None:
    folder.mkdir()
    model, own = trained.model, trained.config.model.predictor
    config = {
        "architectures": ["IWMPredictorModel"],
        "model_type": "iwm_predictor",
        "auto_map": {"AutoConfig": f"{_CODE}.IWMPredictorConfig", "AutoModel": f"{_CODE}.IWMPredictorModel"},
        "kind": own.kind,
        "conditioning": own.conditioning,
        "encoder_width": model.encoder.width,
        "target_width": model.predictor.proj.out_features,
        "patches": model.encoder.patches,
        "hidden_size": own.width,
        "num_hidden_layers": own.depth,
        "num_attention_heads": own.head_count,
        "intermediate_size": round(own.width * own.mlp_ratio),
        "action_names": list(trained.space.names),
        "layer_norm_eps": NORM_EPS,
        "normalize_target": trained.config.model.normalize_target,
        "dtype": "float32",
        "iwm_fast": _about(trained, "predictor"),
    }
    write_json(folder / "config.json", config)
    weights = model.predictor.state_dict()
    if isinstance(model.predictor, VitPredictor):
        weights["pos_embed"] = model.predictor.pos_embed
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    code = resources.files("iwm_fast.export.hub").joinpath(f"{_CODE}.py").read_text(encoding="utf-8")
    (folder / f"{_CODE}.py").write_text(code, encoding="utf-8")


def _preprocessor(image: int) -> dict[str, Any]:
    """Resize the shorter side and crop the centre, as evaluation reads images."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image},
        "resample": _BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": image, "width": image},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
