"""DINOv3's vision transformers under their own names: ``storage_tokens``, no positions but rotations, a mask of the
keys' biases.

The file holds the rotations' periods, which training rounded to bf16. They are computed here, in fp32 from their base,
as timm and transformers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from iwm_fast.families.blocks import TIMM_BLOCKS, BlockNames
from iwm_fast.families.converted import IMAGENET, Converted, Source
from iwm_fast.families.network import Parts, assemble, refuse

__all__ = ["matches", "to_ours"]

BLOCKS = BlockNames(
    TIMM_BLOCKS.index,
    TIMM_BLOCKS.parts,
    {"ls1.gamma": "scale1", "ls2.gamma": "scale2", "attn.qkv.bias_mask": "qkv.mask"},
)
_BASE = 100.0
_BF16 = 2.0**-7  # relative: two roundings


def matches(names: Mapping[str, Any]) -> bool:
    """Return whether these are DINOv3's own names."""
    return {"cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= names.keys() and (
        "storage_tokens" in names or "rope_embed.periods" in names
    )


def to_ours(source: Source) -> Converted:
    """Return DINOv3's encoder as ours. Raises UserError."""
    tokens = tuple(name for name in ("cls_token", "storage_tokens") if name in source.tensors)
    heads, notes = _rotations(source)
    return assemble(
        source,
        Parts(
            family="DINOv3", blocks=BLOCKS, patch="patch_embed.proj", norm="norm", tokens=tokens, positions=None,
            embedded=0, eps=1e-5, heads=heads, pixels=IMAGENET, rule="none", notes=notes,
        ),
    )  # fmt: skip


def _rotations(source: Source) -> tuple[int | None, tuple[str, ...]]:
    """The heads, which the number of periods tells, and a note. Raises UserError for periods of another base."""
    periods = source.tensors.get("rope_embed.periods")
    if periods is None:
        return None, ()
    periods = periods.float()
    exact = _BASE ** (torch.arange(len(periods)) / len(periods))
    off = ((periods - exact).abs() / exact).max()
    if not off < _BF16:
        raise refuse(
            source, f"rope_embed.periods are not those of base {_BASE:g}, which DINOv3's released weights have"
        )
    width = source.tensors["cls_token"].shape[-1]
    note = "periods of rotations in fp32, where the file rounds them to bf16"
    return width // (4 * len(periods)), ((note,) if off > 1e-6 else ())
