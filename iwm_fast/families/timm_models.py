"""timm's `VisionTransformer` (``vit_*``: class token, registers, learned positions, LayerScale) and, under the names of
its `Eva`, DINOv3 (``vit_*_dinov3``).

| theirs | ours |
|---|---|
| cls_token, dist_token, reg_token | prefix |
| pos_embed | pos_embed, and the prefix where it has positions of prefix tokens |
| ls1.gamma, ls2.gamma; gamma_1, gamma_2 | in attn.proj and mlp.w_out, mlp.b_out |
| attn.q_bias, attn.v_bias | in attn.qkv.bias, with zeros between them |
| norm2, mlp.fc1, mlp.fc2 | mlp.norm_*, mlp.*_in, mlp.*_out |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from iwm_fast.families.blocks import TIMM_BLOCKS, BlockNames
from iwm_fast.families.converted import Converted, Source
from iwm_fast.families.network import Parts, assemble, refuse, usual_heads
from iwm_fast.families.resize import side_of

__all__ = ["matches", "matches_dinov3", "to_ours", "to_ours_dinov3"]

BLOCKS = BlockNames(TIMM_BLOCKS.index, TIMM_BLOCKS.parts, {"ls1.gamma": "scale1", "ls2.gamma": "scale2"})
EVA_BLOCKS = BlockNames(
    TIMM_BLOCKS.index,
    dict(TIMM_BLOCKS.parts) | {"attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v"},
    {"gamma_1": "scale1", "gamma_2": "scale2", "attn.q_bias": "q.bias", "attn.v_bias": "v.bias"},
)
_SIZES = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
# Parts of names of architectures that compute with another activation, or another rotation.
_OTHER = {
    r"quickgelu": "the activation quick_gelu",
    r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip": "the activation gelu_tanh",
    r"large_patch16_siglip(_gap)?_512": "the activation gelu_tanh",
    r"_rope_|^eva": "rotations other than DINOv3's",
    r"^aimv2": "MLPs with a gate (SwiGLU)",
}


def matches(names: Mapping[str, Any]) -> bool:
    """Return whether these are the names of timm's VisionTransformer with learned positions."""
    return "patch_embed.proj.weight" in names and "pos_embed" in names and "blocks.0.norm1.weight" in names


def matches_dinov3(names: Mapping[str, Any]) -> bool:
    """Return whether these are timm's names of DINOv3."""
    return {"blocks.0.gamma_1", "patch_embed.proj.weight"} <= names.keys() and "pos_embed" not in names


def to_ours(source: Source) -> Converted:
    """Return a VisionTransformer of timm as ours. Raises UserError."""
    arguments = _arguments(source)
    read = source.tensors
    tokens = tuple(name for name in ("cls_token", "dist_token", "reg_token") if name in read)
    prefix = sum(read[name].shape[-2] for name in tokens)
    return assemble(
        source,
        Parts(
            family="timm's VisionTransformer", blocks=BLOCKS, patch="patch_embed.proj", norm="norm", tokens=tokens,
            positions="pos_embed", embedded=_embedded(source, prefix), eps=_eps(source, 1e-6),
            heads=_heads(source, arguments), rule="antialiased bicubic", patch_rule="pseudo-inverse",
        ),
    )  # fmt: skip


def to_ours_dinov3(source: Source) -> Converted:
    """Return a DINOv3 of timm as ours. Raises UserError."""
    arguments = _arguments(source)
    architecture = source.config.get("architecture")
    if architecture is not None and "dinov3" not in architecture:
        raise refuse(source, f"{architecture} has rotations other than DINOv3's, or is unknown")
    tokens = tuple(name for name in ("cls_token", "reg_token") if name in source.tensors)
    return assemble(
        source,
        Parts(
            family="timm's DINOv3", blocks=EVA_BLOCKS, patch="patch_embed.proj", norm="norm", tokens=tokens,
            positions=None, embedded=0, eps=_eps(source, 1e-5), heads=_heads(source, arguments), rule="none",
            patch_rule="pseudo-inverse", rope_base=float(arguments.get("rope_temperature", 100.0)),
            image=_image(source, arguments),
        ),
    )  # fmt: skip


def _arguments(source: Source) -> Mapping[str, Any]:
    """What config.json says of the model beside its name."""
    arguments = source.config.get("model_args")
    found: Mapping[str, Any] = arguments if isinstance(arguments, Mapping) else {}
    for pattern, what in _OTHER.items():
        if re.search(pattern, str(source.config.get("architecture", ""))):
            raise refuse(source, f"{source.config['architecture']} has {what}, which this encoder does not have")
    if found.get("act_layer") not in (None, "gelu"):
        raise refuse(source, f"its activation is {found['act_layer']}; this encoder's is the exact gelu")
    return found


def _eps(source: Source, usual: float) -> float:
    """Timm's own, or what our export says: arguments of timm cannot hold it."""
    own = source.config.get("iwm_fast")
    return float(own.get("norm_eps", usual)) if isinstance(own, Mapping) else usual


def _heads(source: Source, arguments: Mapping[str, Any]) -> int | None:
    if isinstance(arguments.get("num_heads"), int):
        return int(arguments["num_heads"])
    size = re.match(r"(?:vit|deit3?)_(\w+?)_", str(source.config.get("architecture", "")))
    heads = _SIZES.get(size[1]) if size else None
    width = source.tensors["patch_embed.proj.weight"].shape[0]
    return heads if heads is not None and heads == usual_heads(width) else None


def _image(source: Source, arguments: Mapping[str, Any]) -> int | None:
    pretrained = source.config.get("pretrained_cfg") or source.config
    size = arguments.get("img_size") or (pretrained.get("input_size") or [None])[-1]
    size = size[-1] if isinstance(size, list | tuple) else size
    return size if isinstance(size, int) else None


def _embedded(source: Source, prefix: int) -> int:
    """How many positions belong to prefix tokens: all of these have one, or none."""
    positions = source.tensors["pos_embed"].reshape(-1, source.tensors["pos_embed"].shape[-1]).shape[0]
    with_prefix, without = side_of(positions - prefix) if positions > prefix else None, side_of(positions)
    if with_prefix and without and prefix:  # 9 positions: 3 × 3, or 5 tokens and 2 × 2
        image = _image(source, _arguments(source))
        patch = source.tensors["patch_embed.proj.weight"].shape[-1]
        return prefix if image is not None and image // patch == with_prefix else 0
    return 0 if without and not with_prefix else prefix
