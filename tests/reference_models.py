"""Run in a process of its own: models of timm and transformers with random weights, their files and their features.

Arguments: a folder, and the names of references (default: all small ones). For each it writes a folder OUT/NAME:

    OUT/NAME/weights/               as the library saves it: config.json, model.safetensors; of `Original`: weights.pth
    OUT/NAME/features.safetensors   SETTING.images uint8 (B, S, S, 3), SETTING.features (B, P + L, D), for each setting
    OUT/NAME/about.json             the library, the number of prefix tokens, mean and std of the pixels

A setting is a size of images, and for timm of patches: "own" is the model's, "other" and "patch" are resized by the
library itself. Every parameter is random: nothing hides behind a 0 or a 1.
"""

from __future__ import annotations

import copy
import importlib
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


@dataclass(frozen=True)
class Original:
    """Weights under their authors' own names, as released, which timm's loader reads.

    names: theirs by timm's. extra: further tensors and their shapes. wrap: what the file is around its state_dict.
    """

    timm: str
    names: dict[str, str]
    extra: dict[str, tuple[int, ...]]
    wrap: Callable[[dict[str, torch.Tensor]], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    other: bool = False


def plain(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return state


def released_ijepa(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Encoder, target encoder and predictor of 2 blocks, from ranks' modules, and what a training saves beside them."""
    generator = torch.Generator().manual_seed(7)
    block = {name: value for name, value in state.items() if name.startswith("blocks.")}
    predictor = {f"predictor_{name}": value for name, value in block.items()}
    predictor |= {"mask_token": torch.randn(1, 1, 32, generator=generator)}
    for name, shape in {"embed": (32, 32), "proj": (32, 32)}.items():
        predictor[f"predictor_{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        predictor[f"predictor_{name}.bias"] = torch.randn(32, generator=generator) * 0.2
    predictor |= {f"predictor_norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
    predictor["predictor_pos_embed"] = state["pos_embed"]
    target = {name: value if name == "pos_embed" else value * 1.125 for name, value in state.items()}
    parts = {"encoder": state, "target_encoder": target, "predictor": predictor}
    modules = {part: {f"module.{name}": value for name, value in of.items()} for part, of in parts.items()}
    return {**modules, "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 300, "loss": 0.5}


def sincos(width: int, grid: int, class_row: bool) -> torch.Tensor:
    """MAE's and I-JEPA's table: columns, then rows."""
    frequency = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1).float()[None]
    return torch.cat([torch.zeros(1, 1, width), table], 1) if class_row else table


DINOV3 = {"num_register_tokens": 4, "intermediate_size": 64, "layerscale_value": 0.5}
REFERENCES: dict[str, Timm | HF] = {
    "timm_vit": Timm("vit_small_patch16_224", {**SMALL_TIMM, "num_classes": 5}, HALF),
    "timm_distilled": Timm("deit_small_distilled_patch16_224"),
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
ORIGINALS: dict[str, Original] = {
    "own_dinov2": Original(
        "vit_small_patch14_dinov2", {}, {"mask_token": (1, 32)},
        lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
    ),
    "own_dinov2_reg": Original(
        "vit_small_patch14_reg4_dinov2", {"reg_token": "register_tokens"}, {"mask_token": (1, 32)}, plain, other=True,
    ),
    "own_dinov3": Original(
        "vit_small_patch16_dinov3_qkvb",
        {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"},
        {"mask_token": (1, 32), "local_cls_norm.weight": (32,)}, plain, other=True,
    ),
    "own_ijepa": Original(
        "vit_base_patch16_224", {}, {}, released_ijepa, {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "own_mae": Original(
        "vit_base_patch16_224", {}, {"mask_token": (1, 1, 16), "decoder_embed.weight": (16, 32)},
        lambda state: {"model": state},
    ),
}  # fmt: skip
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


def of_originals(reference: Original, folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """A timm model made from a file under the authors' names by timm's own loader."""
    model = timm.create_model(
        reference.timm, pretrained=False, num_classes=0, **SMALL_TIMM, **reference.arguments
    ).eval()
    randomise(model)
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        theirs = name
        for ours, original in reference.names.items():
            theirs = theirs.replace(ours, original)
        state[theirs] = value
    generator = torch.Generator().manual_seed(3)
    for name, shape in reference.extra.items():
        state[name] = torch.randn(shape, generator=generator)
    if "register_tokens" in state:  # the class token has a position, which timm adds to it
        position = torch.randn(1, 1, 32, generator=generator)
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    if "storage_tokens" in state:  # one bias of three, whose middle part a mask sets to 0
        for block in range(2):
            parts = [state.pop(f"blocks.{block}.attn.{one}_bias") for one in "qv"]
            state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([parts[0], torch.full((32,), float("nan")), parts[1]])
            mask = torch.ones(96)
            mask[32:64] = 0
            state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
        state["rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).to(torch.bfloat16)
    if reference.timm == "vit_base_patch16_224":
        state["pos_embed"] = sincos(32, 4, class_row="cls_token" in state)
    wrapped = reference.wrap(state)
    torch.save(wrapped, folder / "weights.pth")
    module = importlib.import_module(
        "timm.models.eva" if "storage_tokens" in state else "timm.models.vision_transformer"
    )
    loaded = module.checkpoint_filter_fn(
        {"encoder": wrapped["encoder"]} if "encoder" in wrapped else dict(state), model
    )
    missing = model.load_state_dict(loaded, strict=False).missing_keys
    assert not missing, missing
    found: dict[str, torch.Tensor] = {}
    for setting, image in {"own": 32, **({"other": 48} if reference.other else {})}.items():
        resized = copy.deepcopy(model)
        if image != 32:
            resized.set_input_size(img_size=image)
        found[f"{setting}.images"] = images = pictures(image)
        found[f"{setting}.features"] = resized.forward_features(normalised(images, IMAGENET))
    return found, model.num_prefix_tokens


@torch.no_grad()
def build(name: str, out: Path) -> None:
    reference = (REFERENCES | ORIGINALS | FULL)[name]
    folder = out / name
    (folder / "weights").mkdir(parents=True)
    makers: dict[type, Callable[..., Any]] = {Timm: of_timm, HF: of_transformers, Original: of_originals}
    make = makers[type(reference)]
    features, prefix = make(reference, folder / "weights")
    save_file({key: value.contiguous() for key, value in features.items()}, folder / "features.safetensors")
    pixels = getattr(reference, "pixels", IMAGENET)
    about = {"prefix_tokens": prefix, "pixels": pixels, "library": make.__name__.removeprefix("of_")}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[2:] or (*REFERENCES, *ORIGINALS):
        build(chosen, Path(sys.argv[1]))
