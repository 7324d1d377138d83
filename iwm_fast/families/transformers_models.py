"""The vision transformers of transformers: `IJepaModel`, `ViTModel`, `ViTMAEModel`, `Dinov2Model`,
`Dinov2WithRegistersModel` and `DINOv3ViTModel`.

config.json says which, with heads and eps. Files have the names of releases up to 4 (``encoder.layer.0.attention.…``),
which `save_pretrained` still writes, or those of the modules of release 5 (``layers.0.attention.q_proj``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iwm_fast.families.blocks import BlockNames
from iwm_fast.families.converted import Converted, PositionRule, Source
from iwm_fast.families.network import Parts, assemble, refuse

__all__ = ["MODEL_TYPES", "matches", "to_ours"]

_PARTS = {
    **{f"{where}.{name}": part for where in ("attention.attention", "attention") for name, part in (
        ("query", "q"), ("key", "k"), ("value", "v"), ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"),
    )},
    "attention.output.dense": "proj", "attention.o_proj": "proj",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "norm1": "norm1", "norm2": "norm2",
    "intermediate.dense": "fc1", "output.dense": "fc2",
    "mlp.fc1": "fc1", "mlp.fc2": "fc2", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
}  # fmt: skip
BLOCKS = BlockNames(
    r"(?:encoder\.|model\.)?layers?\.(\d+)\.",
    _PARTS,
    {"layer_scale1.lambda1": "scale1", "layer_scale2.lambda1": "scale2"},
)


@dataclass(frozen=True)
class _Kind:
    """A model_type: its class, how it interpolates positions, its prefix tokens, and eps by default."""

    name: str
    rule: PositionRule
    tokens: tuple[str, ...]
    eps: float


MODEL_TYPES = {
    "ijepa": _Kind("IJepaModel", "bicubic", (), 1e-12),
    "vit": _Kind("ViTModel", "bicubic", ("cls_token",), 1e-12),
    "vit_mae": _Kind("ViTMAEModel", "bicubic", ("cls_token",), 1e-12),
    "dinov2": _Kind("Dinov2Model", "bicubic", ("cls_token",), 1e-6),
    "dinov2_with_registers": _Kind(
        "Dinov2WithRegistersModel", "antialiased bicubic", ("cls_token", "register_tokens"), 1e-6
    ),
    "dinov3_vit": _Kind("DINOv3ViTModel", "none", ("cls_token", "register_tokens"), 1e-5),
}
_PATCHES = ("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings")


def matches(names: Mapping[str, Any]) -> bool:
    """Return whether these are names of a vision transformer of transformers."""
    return any(f"{patches}.weight" in names for patches in _PATCHES)


def to_ours(source: Source) -> Converted:
    """Return a model of transformers as ours. Raises UserError."""
    config = source.config
    if not config:
        raise refuse(
            source,
            "these are weights of transformers, whose config.json says their heads and eps",
            "name the folder that has both",
        )
    kind = MODEL_TYPES.get(str(config.get("model_type")))
    if kind is None:
        known = ", ".join(MODEL_TYPES)
        raise refuse(source, f"config.json: model_type is {config.get('model_type')!r}; those known are {known}")
    _require_computable(source, config)
    tokens = tuple(name for name in (f"embeddings.{token}" for token in kind.tokens) if name in source.tensors)
    rope = kind.rule == "none"
    return assemble(
        source,
        Parts(
            family=f"transformers' {kind.name}", blocks=BLOCKS,
            patch=next(name for name in _PATCHES if f"{name}.weight" in source.tensors),
            norm="norm" if rope else "layernorm", tokens=tokens,
            positions=None if rope else "embeddings.position_embeddings", embedded=0 if rope or not tokens else 1,
            eps=float(config.get("layer_norm_eps", kind.eps)), heads=_heads(source, config), rule=kind.rule,
            rope_base=_rope_base(config), image=_image(config),
        ),
    )  # fmt: skip


def _require_computable(source: Source, config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_python"):
        raise refuse(source, f"config.json: hidden_act is {activation}; this encoder's is the exact gelu")
    for key in ("use_swiglu_ffn", "use_gated_mlp"):
        if config.get(key):
            raise refuse(source, f"config.json: {key}: an MLP with a gate (SwiGLU), which this encoder does not have")
    if "embeddings.position_embeddings" not in source.tensors and config["model_type"] != "dinov3_vit":
        raise refuse(source, "embeddings.position_embeddings is missing; the file is no whole")


def _heads(source: Source, config: Mapping[str, Any]) -> int:
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise refuse(source, f"config.json: num_attention_heads is {heads!r}, no number of heads", "restore the file")
    return heads


def _rope_base(config: Mapping[str, Any]) -> float:
    nested = config.get("rope_parameters")
    return float(config.get("rope_theta", nested.get("rope_theta", 100.0) if isinstance(nested, Mapping) else 100.0))


def _image(config: Mapping[str, Any]) -> int | None:
    size = config.get("image_size")
    size = size[-1] if isinstance(size, list | tuple) else size
    return size if isinstance(size, int) else None
