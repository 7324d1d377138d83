"""The weights that a new run starts from: of the encoder and its EMA (``model.init``), and of a frozen target
(``model.target_init``).

The first rank reads the files; the others get its weights. A resumed run reads none of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from iwm_fast.config import EncoderArchitecture, ModelConfig
from iwm_fast.engine.checkpoint.load import is_export, load_export, load_model
from iwm_fast.engine.distributed.ranks import Ranks, decide
from iwm_fast.errors import UserError
from iwm_fast.models.iwm import IWM
from iwm_fast.models.vit import VisionTransformer

__all__ = ["start_from_weights"]


def start_from_weights(model: IWM, ranks: Ranks) -> None:
    """Fill the parts of a new run's model that its configuration reads from files; all ranks call it.

    Raises UserError on every rank where a file is missing, holds another architecture, or numbers that are not finite.
    """
    config = model.config
    if config.init is None and config.target_init is None:
        return
    decide(ranks, lambda: _fill(model))
    if ranks.world > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)


def _fill(model: IWM) -> None:
    config = model.config
    if config.init is not None:
        own = _encoder_weights("init", config.init, config.architecture)
        for encoder in (model.encoder, model.target_encoder if config.target == "ema" else None):
            if encoder is not None:
                _load(encoder, own)
    if config.target_init is not None:
        assert model.target_encoder is not None
        _load(model.target_encoder, _encoder_weights("target_init", config.target_init, config.target_architecture))


@torch.no_grad()
def _load(encoder: VisionTransformer, state: dict[str, Tensor]) -> None:
    encoder.load_state_dict(state)


def _encoder_weights(key: str, place: str, wanted: EncoderArchitecture) -> dict[str, Tensor]:
    """The weights of the encoder that evaluation reads, of a run or an export."""
    path = Path(place)
    if not path.exists():
        raise UserError(f"model.{key}: {path}: no such file or folder; name a run or an export")
    model = load_export(path)[0] if is_export(path) else load_model(path)[0]
    which = model.config.evaluated_encoder
    found = model.config.target_architecture if which == "target" else model.config.architecture
    _require(key, path, found, wanted)
    encoder = model.encoder if which == "context" or model.target_encoder is None else model.target_encoder
    state = encoder.state_dict()
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"model.{key}: {path}: {name} has numbers that are not finite; give other weights")
    return state


def _require(key: str, path: Path, found: EncoderArchitecture, wanted: EncoderArchitecture) -> None:
    """Raise UserError with the keys to set unless the file's architecture is the configuration's."""
    if (found.image, found.patch) != (wanted.image, wanted.patch):
        raise UserError(
            f"model.{key}: {path}: its views have {found.grid} × {found.grid} patches of {found.patch} pixels, this "
            f"configuration's {wanted.grid} × {wanted.grid} of {wanted.patch}: set model.image={found.image} "
            f"model.patch={found.patch}, or give other weights"
        )
    if replace(found, rope_base=wanted.rope_base) == wanted:
        return
    shape = ", ".join(f"{name}: {value}" for name, value in found.shape.model_dump().items())
    parts = {"encoder": f"{{{shape}}}"}
    for name in ("prefix_tokens", "positions", "norm_eps"):
        value = getattr(found, name)
        if value not in (ModelConfig.model_fields[name].default, getattr(wanted, name)):
            parts[name] = value
    if key == "target_init":
        setting = f"model.target_encoder={{{', '.join(f'{name}: {value}' for name, value in parts.items())}}}"
    else:
        setting = " ".join(f"model.{name}={value}" for name, value in parts.items())
    raise UserError(f"model.{key}: {path}: is of another architecture: set '{setting}', or give other weights")
