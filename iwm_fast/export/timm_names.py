"""The encoder under timm's parameter names: the weights load into timm's `VisionTransformer`, with rope into its `Eva`.

Ours differs only in the blocks' MLPs, which own their normalisation (`blocks` says why), in the fixed positions, which
timm stores as a parameter, and in the prefix tokens, which are one parameter here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iwm_fast.config.encoders import EncoderArchitecture, EncoderShape, Positions
from iwm_fast.families.blocks import OUR_MLP
from iwm_fast.models.positions import sincos_positions
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["from_timm", "timm_arguments", "timm_name", "to_timm"]

_MLP_NAMES = {ours: part if part.startswith("norm2") else f"mlp.{part}" for part, ours in OUR_MLP.items()}
_OUR_NAMES = {theirs: ours for ours, theirs in _MLP_NAMES.items()}
_SCALES = ("gamma_1", "gamma_2")  # LayerScale of timm's Eva
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def _rename(name: str, table: Mapping[str, str]) -> str:
    found = _IN_BLOCK.fullmatch(name)
    return name if found is None else found[1] + table.get(found[2], found[2])


def timm_name(name: str) -> str:
    """Return timm's name of a parameter of our encoder."""
    return _rename(name, _MLP_NAMES)


def to_timm(encoder: Mapping[str, Tensor], grid: int, positions: Positions = "sincos") -> dict[str, Tensor]:
    """Return our `VisionTransformer`'s state under timm's names.

    Fixed and learned positions are `pos_embed` (1, grid², D) of timm's VisionTransformer. With rope the names are those
    of its Eva, whose LayerScale (gamma_1, gamma_2) is 1. Prefix tokens are the class token and registers.
    """
    state = {timm_name(name): value for name, value in encoder.items() if name not in ("prefix", "pos_embed")}
    norm = state["norm.weight"]
    if "prefix" in encoder:
        state["cls_token"] = encoder["prefix"][None, :1]
        if len(encoder["prefix"]) > 1:
            state["reg_token"] = encoder["prefix"][None, 1:]
    if positions == "rope":
        for block in sorted({found[1] for name in state if (found := _IN_BLOCK.fullmatch(name))}):
            state |= {f"{block}{scale}": torch.ones_like(norm) for scale in _SCALES}
    else:
        own = encoder.get("pos_embed")
        state["pos_embed"] = (sincos_positions(norm.shape[0], grid).to(norm) if own is None else own)[None]
    return state


def from_timm(state: Mapping[str, Tensor], *, learned: bool = False) -> dict[str, Tensor]:
    """Invert `to_timm`: our names; with positions only where they are learned."""
    tokens = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    apart = {"cls_token", "reg_token", "pos_embed"}
    kept = {name: value for name, value in state.items() if name not in apart and not name.endswith(_SCALES)}
    found = {_rename(name, _OUR_NAMES): value for name, value in kept.items()}
    if tokens:
        found["prefix"] = torch.cat(tokens)
    if learned:
        found["pos_embed"] = state["pos_embed"][0]
    return found


def timm_arguments(architecture: EncoderArchitecture) -> dict[str, Any]:
    """Return the arguments of timm's model that make it compute what our encoder does.

    "architecture" under "pretrained_cfg" is a name for `timm.create_model` with that class: VisionTransformer, or Eva
    with rope. The model's `forward_features` takes images (B, 3, S, S) in 0..1, normalised with `mean` and `std`.
    """
    shape, prefix = architecture.shape, architecture.prefix_tokens
    found: dict[str, Any] = {
        "img_size": architecture.image,
        "patch_size": architecture.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": _ratio(shape),
        "num_classes": 0,
        "class_token": prefix > 0,
        "global_pool": "avg",
    }
    rope = architecture.positions == "rope"
    if rope:
        found |= {"use_fc_norm": False, "num_reg_tokens": max(0, prefix - 1), "use_abs_pos_emb": False}
        found |= {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
        found |= {"rope_temperature": architecture.rope_base, "dynamic_img_size": False}
        # This attention has a bias of keys, which DINOv3 itself lacks, and timm drops arguments that are None.
        found |= {"attn_type": "rope", "qkv_bias": True, "init_values": 1.0}
    else:
        found["fc_norm"] = False
        if prefix:
            found |= {"reg_tokens": prefix - 1, "no_embed_class": True}
    about = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "norm_eps": architecture.norm_eps}
    name = "vit_small_patch16_dinov3" if rope else "vit_base_patch16_224"
    return found | {"pretrained_cfg": about | {"architecture": name}}


def _ratio(shape: EncoderShape) -> float:
    """The ratio from which timm, which rounds down, gets our hidden width, which is rounded to the nearest."""
    hidden = round(shape.width * shape.mlp_ratio)
    if int(shape.width * shape.mlp_ratio) == hidden:
        return shape.mlp_ratio
    ratio = hidden / shape.width
    return ratio if int(shape.width * ratio) == hidden else math.nextafter(ratio, math.inf)
