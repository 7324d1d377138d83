"""The weights of a run or an export as `families` has those of other libraries: read tensor by tensor.

A run's encoder is the one that gradients train; its target encoder is the EMA, or a frozen one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from iwm_fast.config import EncoderArchitecture, ModelConfig
from iwm_fast.engine.checkpoint.format import MANIFEST, Checkpoint
from iwm_fast.engine.checkpoint.load import EXPORT_FILE, find_checkpoint, is_export
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint, named
from iwm_fast.engine.run_directory import run_config
from iwm_fast.errors import UserError, because
from iwm_fast.families import IMAGENET, Converted, LazyTensors, PredictorWeights, lazy_safetensors

__all__ = ["OwnWeights", "is_own", "read_own"]

_PARTS = ("encoder", "target_encoder", "predictor")


@dataclass(frozen=True)
class OwnWeights:
    """encoder: the one that the predictor reads, with its EMA. target: what a frozen target takes, the encoder that
    evaluation reads. files: whose sums identify the weights.
    """

    encoder: Converted
    target: Converted
    predictor: PredictorWeights
    predictor_kind: str
    files: tuple[Path, ...]


def is_own(path: Path) -> bool:
    """Return whether the path names a run, one of its checkpoints, or an export in our own format."""
    if path.is_dir() and is_export(path):
        return (path / "encoder.safetensors").is_file() and (path / "predictor.safetensors").is_file()
    return (named(path).run / "config.yaml").is_file()


def read_own(path: Path) -> OwnWeights:
    """Return the weights of a run or an export. Raises UserError where they are missing or damaged."""
    if is_export(path):
        config = _exported(path / EXPORT_FILE)
        files = tuple(file for part in _PARTS if (file := path / f"{part}.safetensors").is_file())
        parts = {file.stem: lazy_safetensors(file, "export the run again") for file in files}
        return _own(f"export of iwm-fast ({EXPORT_FILE})", config, parts, files)
    checkpoint = find_checkpoint(path)
    config = run_config(chosen_checkpoint(path).run / "config.yaml").model
    saved = Checkpoint(checkpoint)
    made: dict[str, Callable[[], Tensor]] = {}
    for kind in ("weight", "ema"):
        made |= {name: partial(saved.full, kind, name) for name in saved.names(kind)}
    files = (checkpoint / MANIFEST,)
    if saved.frozen is not None:
        frozen = lazy_safetensors(saved.frozen.path, "restore it")
        made |= {name: partial(frozen.__getitem__, name) for name in frozen}
        files = (*files, saved.frozen.path)
    parts = {part: _below(made, f"{part}.") for part in _PARTS}
    return _own(f"run of iwm-fast, {checkpoint.name}", config, {k: v for k, v in parts.items() if len(v)}, files)


def _exported(path: Path) -> ModelConfig:
    """The configuration of an export's model."""
    try:
        return ModelConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["model"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({because(error)})") from error
    except (ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        raise UserError(f"{path}: not as exported ({str(error).splitlines()[0]}); export the run again") from error


def _own(family: str, config: ModelConfig, parts: Mapping[str, LazyTensors], files: tuple[Path, ...]) -> OwnWeights:
    encoder = _converted(family, config.architecture, parts["encoder"])
    target = encoder
    if config.evaluated_encoder == "target" and "target_encoder" in parts:
        encoder = _converted(family, config.architecture, parts["encoder"], parts["target_encoder"])
        target = _converted(family, config.target_architecture, parts["target_encoder"])
    own = config.predictor
    hidden = round(own.width * own.mlp_ratio)
    predictor = PredictorWeights(
        parts["predictor"], own.width, own.depth, hidden, config.encoder_shape.width, own.head_count
    )
    return OwnWeights(encoder, target, predictor, own.kind, files)


def _converted(
    family: str, architecture: EncoderArchitecture, state: LazyTensors, target: LazyTensors | None = None
) -> Converted:
    return Converted(
        family=family, architecture=architecture, encoder=state, heads_known=True, positions="antialiased bicubic",
        patches="pseudo-inverse", pixels=IMAGENET, names={}, target=target,
    )  # fmt: skip


def _below(made: Mapping[str, Callable[[], Tensor]], prefix: str) -> LazyTensors:
    return LazyTensors({name.removeprefix(prefix): make for name, make in made.items() if name.startswith(prefix)})
