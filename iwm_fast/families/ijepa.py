"""I-JEPA's released files: ``encoder``, ``target_encoder`` and ``predictor``, under its own names.

Encoders have timm's names without a class token, and fixed positions: for another grid its own code makes the table
anew. The predictor's blocks are ``predictor_blocks``; it has as many heads as the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iwm_fast.families.blocks import TIMM_BLOCKS, BlockNames, read_blocks
from iwm_fast.families.converted import IMAGENET, Converted, LazyTensors, PredictorWeights, Source
from iwm_fast.families.network import Parts, assemble, refuse
from iwm_fast.families.resize import side_of
from iwm_fast.models.positions import sincos_positions

__all__ = ["PREDICTOR", "matches", "matches_predictor", "predictor_to_ours", "to_ours"]

PREDICTOR = "predictor_embed.weight"  # a name that only its predictor has
PREDICTOR_BLOCKS = BlockNames(r"predictor_blocks\.(\d+)\.", TIMM_BLOCKS.parts)
_OUTER = {
    "embed.weight": PREDICTOR,
    "embed.bias": "predictor_embed.bias",
    "norm.weight": "predictor_norm.weight",
    "norm.bias": "predictor_norm.bias",
    "proj.weight": "predictor_proj.weight",
    "proj.bias": "predictor_proj.bias",
}


def matches(names: Mapping[str, Any]) -> bool:
    """Return whether these are the names of I-JEPA's encoder: timm's, without a class token and LayerScale."""
    needed = {"patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"}
    return needed <= names.keys() and not {"cls_token", "reg_token", "blocks.0.ls1.gamma"} & names.keys()


def matches_predictor(names: Mapping[str, Any]) -> bool:
    """Return whether these are the names of I-JEPA's predictor."""
    return PREDICTOR in names and "predictor_proj.weight" in names


def to_ours(source: Source) -> Converted:
    """Return I-JEPA's encoder as ours. Raises UserError."""
    return assemble(
        source,
        Parts(
            family="I-JEPA", blocks=TIMM_BLOCKS, patch="patch_embed.proj", norm="norm", tokens=(),
            positions="pos_embed", embedded=0, eps=1e-6, heads=None, pixels=IMAGENET, rule="sin-cos",
        ),
    )  # fmt: skip


def predictor_to_ours(source: Source) -> PredictorWeights:
    """Return I-JEPA's predictor as ours, without the action, which it does not have. Raises UserError."""
    read = source.tensors
    for name in (*_OUTER.values(), "mask_token"):
        if name not in read:
            raise refuse(source, f"{name} of the predictor is missing")
    blocks = read_blocks(source, PREDICTOR_BLOCKS)
    _require_table(source)
    made: dict[str, Callable[[], Tensor]] = {ours: partial(read.__getitem__, theirs) for ours, theirs in _OUTER.items()}
    made["mask_token"] = partial(_flat, read, "mask_token")
    made |= {name: partial(blocks.tensors.__getitem__, name) for name in blocks.tensors}
    return PredictorWeights(LazyTensors(made), blocks.width, blocks.depth, blocks.hidden, read[PREDICTOR].shape[1])


def _flat(read: Mapping[str, Tensor], name: str) -> Tensor:
    return read[name].flatten()


def _require_table(source: Source) -> None:
    """Raise UserError unless the predictor's positions are the fixed table, which ours has too."""
    table = source.tensors.get("predictor_pos_embed")
    if table is None:
        return
    table = table.reshape(-1, table.shape[-1]).float()
    grid = side_of(len(table))
    if (
        not grid
        or table.shape[1] % 4
        or not torch.allclose(table, sincos_positions(table.shape[1], grid), rtol=0, atol=5e-6)
    ):
        raise refuse(
            source, "predictor_pos_embed is no table of sines and cosines, which this predictor's positions are"
        )
