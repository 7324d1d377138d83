"""Put an encoder together from a family's parts: patches, prefix tokens, positions, blocks, the last normalisation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import ValidationError
from torch import Tensor

from iwm_fast.config.encoders import EncoderArchitecture, EncoderShape, Positions
from iwm_fast.errors import UserError
from iwm_fast.families.blocks import BlockNames, Blocks, read_blocks
from iwm_fast.families.converted import Converted, LazyTensors, PatchRule, Pixels, PositionRule, Source
from iwm_fast.families.resize import side_of
from iwm_fast.models.positions import sincos_positions

__all__ = ["Parts", "assemble", "refuse", "usual_heads"]

# Tensors that no encoder needs: heads, decoders, mask tokens, poolers.
_LEFT_OUT = re.compile(
    r"(heads?|head_dist|fc|classifier\w*|\w+_classifier|decoder\w*|mask_token|pooler|lm_head|attn_pool|projectors?|"
    r"dino_head|ibot_head|local_cls_norm|fc_norm|pre_logits|rope_embed|predictor\w*)\b.*"
)
# What other tensors beside the blocks belong to.
_FOREIGN = {
    r"norm_pre|pre_layrnorm|ln_pre": "a normalisation before the blocks (CLIP)",
    r"patch_embed\.(norm|backbone|conv|proj\.\d)|stem": "a stem of several layers",
    r"rope\.freqs": "rotations with learned frequencies",
    r"cls_norm": "a normalisation of the class token of its own",
    r"(abs_)?pos_emb\w*_?(h|w|x|y|row|col)\b": "positions of rows and columns",
}
_USUAL_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
# Between a table that a library made in float64 or fp32 and ours; the largest sine is 1.
_SAME_TABLE = 5e-6


@dataclass(frozen=True)
class Parts:
    """A family's names beside its blocks, and what its file or its own code says.

    tokens: names of the prefix tokens, in order. embedded: how many of the positions come first and belong to prefix
    tokens. heads: None where the file does not say. eps, pixels: the file's, or those of the family's own code.
    """

    family: str
    blocks: BlockNames
    patch: str
    norm: str
    tokens: tuple[str, ...]
    positions: str | None
    embedded: int
    eps: float
    heads: int | None
    rule: PositionRule
    patch_rule: PatchRule = "none"
    rope_base: float = 100.0
    image: int | None = None
    pixels: Pixels | None = None
    notes: tuple[str, ...] = ()


def refuse(source: Source, what: str, advice: str = "choose other weights") -> UserError:
    """Return the error of a file that cannot be loaded."""
    return UserError(f"{source.place}: {what}; {advice}")


def usual_heads(width: int) -> int | None:
    """Return the heads of the usual vision transformer of this width, None for other widths."""
    return _USUAL_HEADS.get(width)


def assemble(source: Source, parts: Parts) -> Converted:
    """Return the encoder. Raises UserError where a tensor is missing, or belongs to what our encoder does not have."""
    read = source.tensors
    weight = _patches(source, parts.patch)
    if f"{parts.norm}.weight" not in read:
        raise refuse(source, f"{parts.norm}.weight is missing: this encoder ends with a normalisation of its tokens")
    blocks = read_blocks(source, parts.blocks)
    made: dict[str, Callable[[], Tensor]] = {
        "patch_embed.proj.weight": partial(read.__getitem__, f"{parts.patch}.weight"),
        "patch_embed.proj.bias": partial(_or_zeros, read, f"{parts.patch}.bias", blocks.width),
        "norm.weight": partial(read.__getitem__, f"{parts.norm}.weight"),
        "norm.bias": partial(_or_zeros, read, f"{parts.norm}.bias", blocks.width),
    }
    names = {name: name.replace("patch_embed.proj", parts.patch) for name in made}
    names |= {f"norm.{kind}": f"{parts.norm}.{kind}" for kind in ("weight", "bias")}
    prefix = sum(read[name].numel() // blocks.width for name in parts.tokens)
    if prefix:
        made["prefix"] = partial(_prefix, read, parts, blocks.width)
        names["prefix"] = ", ".join(parts.tokens)
    patch, image, fixed = weight.shape[-1], parts.image, False
    positions: Positions = "rope"
    if parts.positions is not None:
        made["pos_embed"] = partial(_positions, read, parts)
        names["pos_embed"] = parts.positions
        table = made["pos_embed"]().float()
        grid = _grid(source, parts, table)
        image, positions = grid * patch, "learned"
        same = table.shape[1] % 4 == 0 and (table - sincos_positions(table.shape[1], grid)).abs().max() < _SAME_TABLE
        fixed = bool(same)
    used = {*blocks.used, *parts.tokens, *([parts.positions] if parts.positions else [])}
    used |= {f"{name}.{kind}" for name in (parts.patch, parts.norm) for kind in ("weight", "bias")}
    left_out = tuple(sorted(set(read) - used))
    _require_known(source, left_out)
    folded = (("LayerScale into the projections",) if blocks.scaled else ()) + (
        ("the prefix tokens' positions into them",) if parts.embedded else ()
    )
    return Converted(
        family=parts.family,
        architecture=_architecture(source, parts, blocks, image or 0, patch, prefix, positions),
        encoder=LazyTensors(made | {name: partial(blocks.tensors.__getitem__, name) for name in blocks.tensors}),
        heads_known=parts.heads is not None,
        positions=parts.rule,
        patches=parts.patch_rule,
        pixels=source.pixels or parts.pixels,
        names=names | dict(blocks.names),
        fixed_positions=fixed,
        folded=folded,
        notes=parts.notes,
        left_out=left_out,
    )


def _architecture(
    source: Source, parts: Parts, blocks: Blocks, image: int, patch: int, prefix: int, positions: Positions
) -> EncoderArchitecture:
    width = blocks.width
    heads = parts.heads or usual_heads(width) or max(1, width // 64)
    try:
        shape = EncoderShape(depth=blocks.depth, width=width, heads=heads, mlp_ratio=blocks.hidden / width)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise refuse(source, f"its width is {width} and its heads {heads}: {why}") from error
    return EncoderArchitecture(shape, image, patch, prefix, positions, parts.eps, parts.rope_base)


def _or_zeros(read: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    return read[name] if name in read else torch.zeros(size)


def _patches(source: Source, name: str) -> Tensor:
    weight = source.tensors.get(f"{name}.weight")
    if weight is None:
        raise refuse(source, f"{name}.weight is missing: an encoder begins with one linear layer of its patches")
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        shape = "×".join(map(str, weight.shape))
        raise refuse(source, f"{name}.weight is {shape}; patches here are squares of three colours, D×3×p×p")
    return weight


def _prefix(read: Mapping[str, Tensor], parts: Parts, width: int) -> Tensor:
    tokens = torch.cat([read[name].float().reshape(-1, width) for name in parts.tokens])
    if parts.embedded and parts.positions is not None:
        tokens[: parts.embedded] += read[parts.positions].reshape(-1, width)[: parts.embedded].float()
    return tokens


def _positions(read: Mapping[str, Tensor], parts: Parts) -> Tensor:
    assert parts.positions is not None
    table = read[parts.positions]
    return table.reshape(-1, table.shape[-1])[parts.embedded :]


def _grid(source: Source, parts: Parts, table: Tensor) -> int:
    grid = side_of(len(table))
    if grid is None or not grid:
        raise refuse(
            source,
            f"{parts.positions} has {len(table)} positions of patches, no square grid, so they cannot be interpolated",
        )
    return grid


def _require_known(source: Source, left_out: tuple[str, ...]) -> None:
    for name in left_out:
        inner = name.removeprefix("embeddings.")
        if _LEFT_OUT.fullmatch(inner) is None:
            what = next(
                (words for pattern, words in _FOREIGN.items() if re.search(pattern, inner)), "no part known here"
            )
            raise refuse(source, f"{name}: {what}, which this encoder does not have")
