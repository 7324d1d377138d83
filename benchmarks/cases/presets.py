"""Presets of `iwm-fast bench step`: a packaged configuration with overrides that fit the device."""

from __future__ import annotations

from dataclasses import dataclass

from iwm_fast.config import Config, load_config, packaged_config
from iwm_fast.errors import UserError

__all__ = ["PRESETS", "Preset", "preset_config"]


@dataclass(frozen=True)
class Preset:
    """A packaged configuration, its overrides, and its device."""

    config: str
    overrides: tuple[str, ...]
    device: str


PRESETS = {
    "cpu-micro": Preset("vit_tiny_p4_32", ("train.global_batch=32",), "cpu"),
    "cpu-tiny": Preset("vit_tiny_p8_96", ("train.global_batch=32",), "cpu"),
    "cpu-tiny-bf16": Preset("vit_tiny_p8_96", ("train.global_batch=32", "train.precision=bf16"), "cpu"),
    "gpu-small": Preset("vit_small_p16_224", ("train.global_batch=512", "train.micro_batch=512"), "cuda"),
    "gpu-base": Preset("vit_base_p16_224_equi", ("train.global_batch=256", "train.micro_batch=256"), "cuda"),
    "gpu-base-fp8": Preset(
        "vit_base_p16_224_equi",
        ("train.global_batch=256", "train.micro_batch=256", "model.target_precision=fp8"),
        "cuda",
    ),
    "gpu-large": Preset("vit_large_p16_224", ("train.global_batch=128", "train.micro_batch=128"), "cuda"),
}


def preset_config(name: str, overrides: tuple[str, ...] = ()) -> Config:
    """Return the configuration of a preset with further overrides. Raise UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"{name}: no such preset; choose from {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return load_config(packaged_config(preset.config), [*preset.overrides, *overrides])
