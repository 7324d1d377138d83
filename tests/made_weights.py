"""Small random weights under the names of timm's VisionTransformer, and of a folder of transformers."""

import json

import torch
from safetensors.torch import save_file

from iwm_fast.config import EncoderArchitecture, EncoderShape

SHAPE = EncoderShape(depth=2, width=32, heads=2, mlp_ratio=2.0)
# Of `timm_state` with a class token.
OWN = EncoderArchitecture(SHAPE, 32, 8, prefix_tokens=1, positions="learned")


def timm_state(grid=4, patch=8, *, width=32, depth=2, tokens=1, scaled=False):
    """The names and shapes of timm's VisionTransformer, tokens: a class token, then registers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, grid * grid + tokens, width), "norm.weight": (width,), "norm.bias": (width,)}
    if tokens:
        shapes["cls_token"] = (1, 1, width)
    if tokens > 1:
        shapes["reg_token"] = (1, tokens - 1, width)
    for block in range(depth):
        inner = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        inner |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
        for name, shape in inner.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        if scaled:
            shapes |= {f"blocks.{block}.ls{i}.gamma": (width,) for i in (1, 2)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def hub_folder(folder, model_type="vit", **config):
    """A folder of transformers with a ViTModel's names, and config.json with these changes."""
    state = timm_state()
    renamed = {"embeddings.cls_token": state["cls_token"], "embeddings.position_embeddings": state["pos_embed"]}
    for kind in ("weight", "bias"):
        renamed[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        renamed[f"layernorm.{kind}"] = state[f"norm.{kind}"]
        for block in range(2):
            ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
            parts = zip(("query", "key", "value"), state[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True)
            renamed |= {f"{theirs}attention.attention.{name}.{kind}": part.clone() for name, part in parts}
            for name, other in {
                "attn.proj": "attention.output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }.items():  # fmt: skip
                renamed[f"{theirs}{other}.{kind}"] = state[f"{ours}{name}.{kind}"]
    about = {"model_type": model_type, "num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about | config))
    save_file(renamed, folder / "model.safetensors")
    return folder
