"""MAE's released encoders, under its own names, which are timm's, with positions that are a fixed table.

The class token's row of the table is 0. A file of the whole model has a decoder (``decoder_*``), which is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from iwm_fast.families.blocks import TIMM_BLOCKS
from iwm_fast.families.converted import IMAGENET, Converted, Source
from iwm_fast.families.network import Parts, assemble
from iwm_fast.families.resize import side_of
from iwm_fast.models.positions import sincos_positions

__all__ = ["matches", "to_ours"]


def matches(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are MAE's: timm's names with a decoder, or with its table of positions."""
    if not {"patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.norm1.weight"} <= tensors.keys():
        return False
    if "decoder_embed.weight" in tensors:
        return True
    if "blocks.0.ls1.gamma" in tensors or "reg_token" in tensors or "dist_token" in tensors:
        return False
    table = tensors["pos_embed"].reshape(-1, tensors["pos_embed"].shape[-1])
    grid = side_of(len(table) - 1)
    if not grid or table.shape[1] % 4 or bool(table[0].any()):
        return False
    return bool(torch.allclose(table[1:].float(), sincos_positions(table.shape[1], grid), rtol=0, atol=5e-6))


def to_ours(source: Source) -> Converted:
    """Return MAE's encoder as ours. Raises UserError."""
    return assemble(
        source,
        Parts(
            family="MAE", blocks=TIMM_BLOCKS, patch="patch_embed.proj", norm="norm", tokens=("cls_token",),
            positions="pos_embed", embedded=1, eps=1e-6, heads=None, pixels=IMAGENET, rule="bicubic",
        ),
    )  # fmt: skip
