"""The encoder under timm's parameter names: the weights load into timm's `VisionTransformer`.

Ours differs only in the blocks' MLPs, which own their normalisation (`blocks` says why), and in the fixed positions,
which timm stores as a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iwm_fast.config.schema import ModelConfig
from iwm_fast.errors import UserError
from iwm_fast.models.positions import sincos_positions
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["from_timm", "timm_arguments", "timm_name", "to_timm"]

_MLP_NAMES = {
    "mlp.norm_weight": "norm2.weight",
    "mlp.norm_bias": "norm2.bias",
    "mlp.w_in": "mlp.fc1.weight",
    "mlp.b_in": "mlp.fc1.bias",
    "mlp.w_out": "mlp.fc2.weight",
    "mlp.b_out": "mlp.fc2.bias",
}
_OUR_NAMES = {theirs: ours for ours, theirs in _MLP_NAMES.items()}
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def _rename(name: str, table: Mapping[str, str]) -> str:
    found = _IN_BLOCK.fullmatch(name)
    return name if found is None else found[1] + table.get(found[2], found[2])


def timm_name(name: str) -> str:
    """Return timm's name of a parameter of our encoder."""
    return _rename(name, _MLP_NAMES)


def to_timm(encoder: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Return our `VisionTransformer`'s state under timm's names, with `pos_embed` (1, grid², D).

    The first prefix token is timm's class token, the others its registers.
    """
    state = {timm_name(name): value for name, value in encoder.items() if name != "prefix"}
    norm = state["norm.weight"]
    positions = encoder["pos_embed"] if "pos_embed" in encoder else sincos_positions(norm.shape[0], grid).to(norm)
    state["pos_embed"] = positions[None]
    if "prefix" in encoder:
        state["cls_token"] = encoder["prefix"][None, :1]
        if len(encoder["prefix"]) > 1:
            state["reg_token"] = encoder["prefix"][None, 1:]
    return state


def from_timm(state: Mapping[str, Tensor], *, learned: bool = False) -> dict[str, Tensor]:
    """Invert `to_timm`: our names; with positions only where they are learned."""
    tokens = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    apart = {"cls_token", "reg_token", "pos_embed"}
    found = {_rename(name, _OUR_NAMES): value for name, value in state.items() if name not in apart}
    if tokens:
        found["prefix"] = torch.cat(tokens)
    if learned:
        found["pos_embed"] = state["pos_embed"][0]
    return found


def timm_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of timm's `VisionTransformer` that make it compute what our encoder does.

    Its `forward_features` then takes images (B, 3, S, S) in 0..1, normalised with `mean` and `std`, which stand under
    "pretrained_cfg" as timm writes them. UserError for rope, which timm has in another class.
    """
    if model.positions == "rope":
        raise UserError("model.positions is rope, which timm's VisionTransformer has not: this run cannot be exported")
    shape = model.encoder_shape
    return {
        "img_size": model.image,
        "patch_size": model.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "num_classes": 0,
        "class_token": model.prefix_tokens > 0,
        "reg_tokens": max(0, model.prefix_tokens - 1),
        "no_embed_class": True,  # prefix tokens have no position
        "global_pool": "avg",
        "fc_norm": False,
        "pretrained_cfg": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "norm_eps": model.norm_eps},
    }
