"""An encoder as a class of transformers: which class computes what it does, its configuration, and its weights' names.

| encoder | class |
|---|---|
| no prefix tokens, fixed or learned positions | IJepaModel |
| a class token, fixed or learned positions | Dinov2Model; ViTModel where the MLP's ratio is no whole number |
| a class token and registers, fixed or learned positions | Dinov2WithRegistersModel |
| a class token, with registers or without, rope | DINOv3ViTModel |

Names are those of the files on the Hub, which `save_pretrained` writes too. What a class has and ours lacks is written
so that it changes nothing: LayerScale is 1, positions of class tokens are 0 (they are added in already), mask tokens
are 0, and ViTModel's pooler returns the class token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iwm_fast.config.encoders import EncoderArchitecture
from iwm_fast.models.positions import sincos_positions

__all__ = ["HubClass", "hub_class"]

# Names within encoder.layer.N of IJepaModel and ViTModel, and of both Dinov2 classes.
_VIT = {
    "norm1": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_DINOV2 = _VIT | {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
# Within layer.N.
_DINOV3 = {
    "norm1": "norm1",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "proj": "attention.o_proj",
    "norm2": "norm2",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}


@dataclass(frozen=True)
class HubClass:
    """A class of transformers for an encoder: its name, its model_type, and how its first and last parts are named.

    blocks, names: the prefix of block N and the names within it. prefix: its class and register tokens have names.
    """

    name: str
    model_type: str
    architecture: EncoderArchitecture
    blocks: str
    names: Mapping[str, str]
    patches: str
    norm: str
    scaled: bool = False

    def config(self) -> dict[str, Any]:
        """Return its config.json, as `save_pretrained` would write it, without the library's version."""
        shape = self.architecture.shape
        found = {
            "architectures": [self.name],
            "model_type": self.model_type,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "image_size": self.architecture.image,
            "patch_size": self.architecture.patch,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": self.architecture.norm_eps,
            "dtype": "float32",
        }
        hidden = round(shape.width * shape.mlp_ratio)
        if self.model_type.startswith("dinov2"):
            found |= {"mlp_ratio": hidden // shape.width, "qkv_bias": True, "layerscale_value": 1.0}
            found |= {"use_swiglu_ffn": False, "use_mask_token": False}
        else:
            found["intermediate_size"] = hidden
        if self.model_type in ("ijepa", "vit"):
            found["qkv_bias"] = True
        if self.model_type == "vit":  # its pooler is the identity
            found |= {"pooler_output_size": shape.width, "pooler_act": "linear"}
        if self.model_type == "dinov3_vit":
            found |= {"key_bias": True, "rope_theta": self.architecture.rope_base, "layerscale_value": 1.0}
            found |= {"pos_embed_rescale": None, "use_gated_mlp": False}  # no augmentation of positions in training
        if self.model_type in ("dinov2_with_registers", "dinov3_vit"):
            found["num_register_tokens"] = self.architecture.prefix_tokens - 1
        return found

    def weights(self, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our encoder's state under the class's names."""
        found = self._first(encoder)
        for block in range(self.architecture.shape.depth):
            ours = {
                name.removeprefix(f"blocks.{block}."): value
                for name, value in encoder.items()
                if name.startswith(f"blocks.{block}.")
            }
            found |= {f"{self.blocks}.{block}.{name}": value for name, value in self._block(ours).items()}
        found |= {f"{self.norm}.{kind}": encoder[f"norm.{kind}"] for kind in ("weight", "bias")}
        if self.model_type == "vit":
            width = self.architecture.shape.width
            norm = encoder["norm.weight"]
            found |= {"pooler.dense.weight": torch.eye(width).to(norm), "pooler.dense.bias": torch.zeros_like(norm)}
        return found

    def _first(self, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings: patches, prefix tokens and positions."""
        found = {
            f"embeddings.{self.patches}.{kind}": encoder[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")
        }
        norm = encoder["norm.weight"]
        prefix = encoder["prefix"][None] if self.architecture.prefix_tokens else norm.new_zeros(1, 0, len(norm))
        if prefix.shape[1]:
            found["embeddings.cls_token"] = prefix[:, :1]
        if self.architecture.positions != "rope":
            own = encoder.get("pos_embed")
            positions = sincos_positions(len(norm), self.architecture.grid).to(norm) if own is None else own
            found["embeddings.position_embeddings"] = torch.cat(
                [torch.zeros_like(prefix[:, :1]), positions[None]], dim=1
            )
        if self.model_type in ("dinov2_with_registers", "dinov3_vit"):
            found["embeddings.register_tokens"] = prefix[:, 1:]
            shape = (1, 1, len(norm)) if self.model_type == "dinov3_vit" else (1, len(norm))
            found["embeddings.mask_token"] = norm.new_zeros(shape)
        return found

    def _block(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            parts = zip(("query", "key", "value"), ours[f"attn.qkv.{kind}"].chunk(3), strict=True)
            mlp = {"norm2": f"mlp.norm_{kind}", "fc1": f"mlp.{kind[0]}_in", "fc2": f"mlp.{kind[0]}_out"}
            every = {
                "norm1": ours[f"norm1.{kind}"],
                **dict(parts),
                "proj": ours[f"attn.proj.{kind}"],
                **{name: ours[own] for name, own in mlp.items()},
            }
            theirs |= {f"{self.names[name]}.{kind}": value for name, value in every.items()}
        if self.scaled:
            one = torch.ones_like(ours["norm1.weight"])
            theirs |= {"layer_scale1.lambda1": one, "layer_scale2.lambda1": one.clone()}
        return theirs


def hub_class(architecture: EncoderArchitecture) -> HubClass | str:
    """Return the class that computes what an encoder does, or why none does."""
    prefix, shape = architecture.prefix_tokens, architecture.shape
    whole = round(shape.width * shape.mlp_ratio) % shape.width == 0
    if architecture.positions == "rope":
        if not prefix:
            return "none of its classes has rope without a class token"
        return HubClass(
            "DINOv3ViTModel", "dinov3_vit", architecture, "layer", _DINOV3, "patch_embeddings", "norm", scaled=True
        )
    patches = "patch_embeddings.projection"
    if not prefix:
        return HubClass("IJepaModel", "ijepa", architecture, "encoder.layer", _VIT, patches, "layernorm")
    if not whole and prefix > 1:
        return f"none of its classes has registers and an MLP of {shape.mlp_ratio:g} times the width, no whole number"
    if not whole:
        return HubClass("ViTModel", "vit", architecture, "encoder.layer", _VIT, patches, "layernorm")
    name, kind = ("Dinov2Model", "dinov2") if prefix == 1 else ("Dinov2WithRegistersModel", "dinov2_with_registers")
    return HubClass(name, kind, architecture, "encoder.layer", _DINOV2, patches, "layernorm", scaled=True)
