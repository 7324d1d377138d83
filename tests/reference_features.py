"""The families of tests/reference_models.py, and the comparison of their features with our encoder's."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import torch
from safetensors.torch import load_file

from iwm_fast.families import fit_encoder, read_weights, recognise
from iwm_fast.models.vit import VisionTransformer

# Of the largest feature, fp32: two blocks in another order of sums measure 4e-7, twelve 2e-6.
TOLERANCE = 1e-5
FAMILIES = {
    "timm_vit": "timm's VisionTransformer",
    "timm_distilled": "timm's VisionTransformer",
    "timm_dinov2": "timm's VisionTransformer",
    "timm_reg4_dinov2": "timm's VisionTransformer",
    "timm_dinov3": "timm's DINOv3",
    "timm_dinov3_qkvb": "timm's DINOv3",
    "hf_ijepa": "transformers' IJepaModel",
    "hf_dinov2": "transformers' Dinov2Model",
    "hf_dinov2_with_registers": "transformers' Dinov2WithRegistersModel",
    "hf_dinov3": "transformers' DINOv3ViTModel",
    "hf_vit": "transformers' ViTModel",
    "hf_vit_mae": "transformers' ViTMAEModel",
    "own_dinov2": "DINOv2",
    "own_dinov2_reg": "DINOv2 with registers",
    "own_dinov3": "DINOv3",
    "own_ijepa": "I-JEPA",
    "own_mae": "MAE",
}
FULL = ("full_timm_vit", "full_timm_dinov2", "full_timm_reg4_dinov2", "full_timm_dinov3")
HEADS = 2  # of the small references; files under their authors' names do not say


def weights_of(folder):
    """The path that a user gives."""
    file = folder / "weights" / "weights.pth"
    return file if file.exists() else folder / "weights"


def require_equal(folder):
    """Compare all settings of a reference; return them."""
    features = load_file(folder / "features.safetensors")
    place = weights_of(folder)
    found = recognise(read_weights(place))
    shape = found.architecture.shape
    own = found.architecture
    if not found.heads_known:
        own = replace(own, shape=shape.model_copy(update={"heads": HEADS}))
    assert own.prefix_tokens == json.loads((folder / "about.json").read_text())["prefix_tokens"]
    settings = sorted({name.split(".")[0] for name in features})
    for setting in settings:
        images, want = features[f"{setting}.images"], features[f"{setting}.features"]
        side, patches = images.shape[1], want.shape[1] - own.prefix_tokens
        wanted = replace(own, image=side, patch=side // math.isqrt(patches))
        encoder = VisionTransformer(wanted).eval()
        encoder.load_state_dict(fit_encoder(str(place), found, wanted).encoder)
        with torch.no_grad():
            got = encoder.all_tokens(images)
        assert got.shape == want.shape
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max(), setting
    return settings
