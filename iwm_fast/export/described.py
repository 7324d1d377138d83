"""What an export records of its run: common to all formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.load import EXPORT_SCHEMA, find_checkpoint, load_model
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.environment import environment
from iwm_fast.errors import UserError, because
from iwm_fast.eval.features import EncoderName, default_encoder
from iwm_fast.eval.measurements import weights_of
from iwm_fast.models.iwm import IWM
from iwm_fast.models.vit import VisionTransformer

__all__ = ["PIXELS", "TOKENS", "Trained", "open_trained", "several_frames", "write_json"]

_HOLDS = {
    "context": "context encoder: {context}, its tokens are what the predictor reads",
    "target": "target encoder: {target}, its tokens are what predictions are compared with",
    "predictor": "predictor: the world model, from the context encoder's tokens and an action to the target's tokens",
}
TOKENS = "none: one token per patch, after the last normalisation"
PIXELS = "RGB in [0, 1], normalised with ImageNet's mean and std"
# What an evaluation reads of the run beside its model and actions. No paths, and nothing of the machine.
_EVALUATION = {
    "train": ("seed", "ema", "horizon"),
    "data": ("device", "max_pixels", "max_bad_fraction"),
    "eval": ("images", "mrr_images", "bank", "horizon"),
}
_PATHS = ("init", "init_predictor", "target_init")


@dataclass(frozen=True)
class Trained:
    """A run's checkpoint, loaded in fp32 on the CPU. run: its folder; checkpoint: its name; weights: its digest."""

    run: Path
    checkpoint: str
    weights: str
    model: IWM
    config: Config
    space: ActionSpace
    step: int

    @property
    def evaluated(self) -> EncoderName:
        """The encoder that evaluation reads."""
        return default_encoder(self.model.config)

    @property
    def encoders(self) -> dict[EncoderName, VisionTransformer]:
        """The encoders by name; the target only where it is not the context encoder itself."""
        found: dict[EncoderName, VisionTransformer] = {"context": self.model.encoder}
        return found | ({"target": self.model.target_encoder} if self.model.target_encoder is not None else {})

    def described(self) -> dict[str, Any]:
        """Return the JSON that every format has: the model, its actions, the checkpoint, and how it is evaluated."""
        model = self.config.model.described()
        model |= {key: Path(model[key]).name for key in _PATHS if model.get(key) is not None}  # no paths of a machine
        whole = self.config.model_dump(mode="json")
        initial = self.initial_weights()
        return {
            "schema": EXPORT_SCHEMA,
            "environment": environment(),
            "checkpoint": self.checkpoint,
            "step": self.step,
            "weights": self.weights,
            "model": model,
            "actions": {**self.config.actions.model_dump(mode="json"), "names": list(self.space.names)},
            "evaluation": {name: {key: whole[name][key] for key in keys} for name, keys in _EVALUATION.items()},
            **({"initial_weights": initial} if initial is not None else {}),
        }

    def file_entry(self, part: str, layout: str, pooling: str) -> dict[str, Any]:
        """Return what config.json says of a file. part: context, target or predictor."""
        target = "frozen" if self.config.model.target == "frozen" else "the EMA of the context encoder"
        context = "frozen" if self.config.model.freeze_encoder else "trained by gradients"
        holds, evaluated = _HOLDS[part].format(target=target, context=context), part == self.evaluated
        about = {"part": part, "holds": holds, "layout": layout, "pooling": pooling, "evaluated": evaluated}
        return about | {"dtype": "float32"}

    def initial_weights(self) -> dict[str, Any] | None:
        """Return what the run records of the weights that it started from, without this machine's paths, or None."""
        file = RunDirectory(self.run).initial_weights_file
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except (OSError, ValueError) as error:
            why = because(error) if isinstance(error, OSError) else "not JSON"
            raise UserError(f"{file}: cannot be read ({why}); restore it, or remove it to export without it") from error
        return _without_paths(found) if isinstance(found, dict) else None


def _without_paths(value: Any) -> Any:
    """Reduce paths of files and folders to their last part: an export is published."""
    if isinstance(value, dict):
        return {
            key: Path(item).name if key == "path" and isinstance(item, str) else _without_paths(item)
            for key, item in value.items()
        }
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def several_frames(trained: Trained) -> str | None:
    """Return why a format whose predictor reads one frame (`dense.WholePredictor`) cannot hold a run, or None."""
    frames = trained.config.model.history
    return None if frames == 1 else f"its predictor reads {frames} frames (model.history), and this format's reads one"


def open_trained(run: Path, which: str = "latest") -> Trained:
    """Load a run's checkpoint, named as for `find_checkpoint`. Raises UserError."""
    checkpoint = find_checkpoint(run, which)
    model, config, space, step = load_model(run, checkpoint.name)
    folder = chosen_checkpoint(run, which).run
    return Trained(folder, checkpoint.name, weights_of(checkpoint), model, config, space, step)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of an export."""
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
