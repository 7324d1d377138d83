"""Run in a process of its own: models of timm and transformers with random weights, their files and their features.

Arguments: a folder, and the names of references (default: all small ones). For each it writes a folder OUT/NAME:

    OUT/NAME/weights/               as the library saves it: config.json, model.safetensors
    OUT/NAME/features.safetensors   SETTING.images uint8 (B, S, S, 3), SETTING.features (B, P + L, D), for each setting
    OUT/NAME/about.json             the library, the number of prefix tokens, mean and std of the pixels

A setting is a size of images, and for timm of patches: "own" is the model's, "other" and "patch" are resized by the
library itself. Every parameter is random: nothing hides behind a 0 or a 1.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reference_libraries import import_torchvision

import_torchvision()
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
WITH_MLP = SMALL_HF | {"intermediate_size": 64}


@dataclass(frozen=True)
class Timm:
    """A model of timm's registry. other: images and patches of the settings beside its own."""

    name: str
    arguments: dict[str, Any] = field(default_factory=lambda: dict(SMALL_TIMM))
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    other: dict[str, tuple[int, int]] = field(default_factory=lambda: {"other": (48, 8), "patch": (48, 12)})


@dataclass(frozen=True)
class HF:
    """A model class of transformers and its configuration."""

    kind: str
    arguments: dict[str, Any]
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    interpolates: bool = False  # its forward pass takes interpolate_pos_encoding
    shards: str | None = None
    other: int = 48


DINOV3 = {"num_register_tokens": 4, "intermediate_size": 64, "layerscale_value": 0.5}
REFERENCES: dict[str, Timm | HF] = {
    "timm_vit": Timm("vit_small_patch16_224", {**SMALL_TIMM, "num_classes": 5}, HALF),
    "timm_dinov2": Timm("vit_small_patch14_dinov2"),
    "timm_reg4_dinov2": Timm("vit_small_patch14_reg4_dinov2"),
    "timm_dinov3": Timm("vit_small_patch16_dinov3"),
    "timm_dinov3_qkvb": Timm("vit_small_patch16_dinov3_qkvb"),
    "hf_ijepa": HF("IJepa", WITH_MLP, interpolates=True),
    "hf_dinov2": HF("Dinov2", SMALL_HF | {"mlp_ratio": 2}, shards="30KB"),
    "hf_dinov2_with_registers": HF("Dinov2WithRegisters", SMALL_HF | {"mlp_ratio": 2, "num_register_tokens": 3}),
    "hf_dinov3": HF("DINOv3ViT", SMALL_HF | DINOV3),
    "hf_vit": HF("ViT", WITH_MLP, HALF, interpolates=True),
    "hf_vit_mae": HF("ViTMAE", WITH_MLP | {"mask_ratio": 0.0}, interpolates=True),
}
# The sizes at which these are released; some 22 million weights each.
FULL: dict[str, Timm | HF] = {
    "full_timm_vit": Timm("vit_small_patch16_224", {}, HALF, {"other": (160, 16)}),
    "full_timm_dinov2": Timm("vit_small_patch14_dinov2", {"img_size": 224}, other={"other": (154, 14)}),
    "full_timm_reg4_dinov2": Timm("vit_small_patch14_reg4_dinov2", {"img_size": 224}, other={"other": (154, 14)}),
    "full_timm_dinov3": Timm("vit_small_patch16_dinov3", {}, other={"other": (160, 16)}),
}


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Give every parameter random values of a size that leaves the features of order 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith(("weight", "gamma", "lambda1", "gamma_1", "gamma_2")):
            parameter.copy_(0.8 + 0.2 * noise)  # normalisations and LayerScale
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif "token" in name or "pos" in name:
            parameter.copy_(0.5 * noise)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.copy_(noise * fan_in**-0.5)


def pictures(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, side, side, 3), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)


def normalised(images: torch.Tensor, pixels: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in pixels)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def of_timm(reference: Timm, folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    model = timm.create_model(reference.name, pretrained=False, **reference.arguments).eval()
    randomise(model)
    mean, std = reference.pixels
    save_for_hf(model, folder, safe_serialization=True, model_config={"pretrained_cfg": {"mean": mean, "std": std}})
    found: dict[str, torch.Tensor] = {}

    own = model.patch_embed.patch_size[0]
    for setting, (image, patch) in {"own": (model.patch_embed.img_size[0], own), **reference.other}.items():
        resized = copy.deepcopy(model)
        if setting != "own":
            resized.set_input_size(img_size=image, **({"patch_size": patch} if patch != own else {}))
        found[f"{setting}.images"] = images = pictures(image)
        found[f"{setting}.features"] = resized.forward_features(normalised(images, reference.pixels))
    return found, model.num_prefix_tokens


def of_transformers(reference: HF, folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    config = getattr(transformers, f"{reference.kind}Config")(**reference.arguments)
    model = getattr(transformers, f"{reference.kind}Model")(config).eval()
    randomise(model)
    model.save_pretrained(folder, **({"max_shard_size": reference.shards} if reference.shards else {}))
    mean, std = reference.pixels
    about = {"image_mean": mean, "image_std": std, "size": {"height": config.image_size, "width": config.image_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    found: dict[str, torch.Tensor] = {}
    for setting, side in {"own": config.image_size, "other": reference.other}.items():
        patches = (side // config.patch_size) ** 2
        words: dict[str, Any] = {"interpolate_pos_encoding": True} if reference.interpolates else {}
        if reference.kind == "ViTMAE":
            words["noise"] = torch.arange(float(patches)).expand(2, -1)  # the order of patches stays
        found[f"{setting}.images"] = images = pictures(side)
        found[f"{setting}.features"] = model(normalised(images, reference.pixels), **words).last_hidden_state
    return found, found["own.features"].shape[1] - (config.image_size // config.patch_size) ** 2


@torch.no_grad()
def build(name: str, out: Path) -> None:
    reference = (REFERENCES | FULL)[name]
    folder = out / name
    (folder / "weights").mkdir(parents=True)
    make: Callable[..., tuple[dict[str, torch.Tensor], int]] = (
        of_timm if isinstance(reference, Timm) else of_transformers
    )
    features, prefix = make(reference, folder / "weights")
    save_file({key: value.contiguous() for key, value in features.items()}, folder / "features.safetensors")
    about = {"prefix_tokens": prefix, "pixels": reference.pixels, "library": make.__name__.removeprefix("of_")}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[2:] or REFERENCES:
        build(chosen, Path(sys.argv[1]))
