"""Transformer blocks of a family as ours: names, the three projections in one, missing biases, LayerScale folded in.

A family describes its blocks by `BlockNames`. Parts of a block are those of ours before they were renamed: norm1, qkv
(or q, k, v), proj, norm2, fc1, fc2, and scale1, scale2 of LayerScale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.families.converted import LazyTensors, Source

__all__ = ["OUR_MLP", "TIMM_BLOCKS", "BlockNames", "Blocks", "read_blocks"]

# Our names of the parts of a block that `models.blocks.ConditionedMlp` owns.
OUR_MLP = {
    "norm2.weight": "mlp.norm_weight",
    "norm2.bias": "mlp.norm_bias",
    "fc1.weight": "mlp.w_in",
    "fc1.bias": "mlp.b_in",
    "fc2.weight": "mlp.w_out",
    "fc2.bias": "mlp.b_out",
}
# What a name in a block that has no place here belongs to, by a part of the name.
_FOREIGN = {
    r"mlp\.(w12|w1|w2|w3|fc1_g|fc1_x|weights_in|weights_out|gate_proj)": "an MLP with a gate (SwiGLU)",
    r"(q|k)_norm": "normalised queries and keys (qk-norm)",
    r"attn\.(norm|inner_attn_ln)": "a normalisation in the attention",
    r"mlp\.(norm|ffn_ln)": "a normalisation in the MLP",
    r"relative_position|rel_pos": "relative positions",
    r"gate": "a gated attention",
    r"lora|\.base_layer": "adapters (LoRA): merge them into the weights first",
}


@dataclass(frozen=True)
class BlockNames:
    """How a family names its blocks.

    index: matches the beginning of a block's name, its group the block's number. parts: our part by the family's name,
    without .weight and .bias; a name may have several spellings. whole: our part, .weight or .bias included, by names
    that stand for themselves. ignored: names of buffers.
    """

    index: str
    parts: Mapping[str, str]
    whole: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


TIMM_BLOCKS = BlockNames(
    r"blocks\.(\d+)\.",
    {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"},
)


@dataclass(frozen=True)
class Blocks:
    """Blocks under our names. names: of the file, by ours. hidden: of their MLPs. scaled: LayerScale was folded in."""

    tensors: LazyTensors
    depth: int
    width: int
    hidden: int
    scaled: bool
    names: Mapping[str, str]
    used: frozenset[str]


def read_blocks(source: Source, names: BlockNames) -> Blocks:
    """Return a network's blocks. Raises UserError where one has a part that ours cannot compute, or lacks one."""
    found: dict[int, dict[str, str]] = {}
    used: set[str] = set()
    for name in source.tensors:
        match = re.match(names.index, name)
        if match is None:
            continue
        used.add(name)
        inner = name[match.end() :]
        if inner in names.ignored:
            continue
        found.setdefault(int(match[1]), {})[_part(source, names, name, inner)] = name
    depth = len(found)
    if sorted(found) != list(range(depth)) or not found:
        missing = next((i for i in range(max(found, default=0)) if i not in found), 0)
        raise UserError(f"{source.place}: block {missing} of {max(found, default=0) + 1} is missing; download it again")
    made: dict[str, Callable[[], Tensor]] = {}
    ours: dict[str, str] = {}
    for block in range(depth):
        for name, (make, theirs) in _block(source, block, found[block]).items():
            made[f"blocks.{block}.{name}"] = make
            ours[f"blocks.{block}.{name}"] = theirs
    hidden, width = source.tensors[found[0]["fc1.weight"]].shape
    scaled = any(part.startswith("scale") for part in found[0])
    return Blocks(LazyTensors(made), depth, width, hidden, scaled, ours, frozenset(used))


def _part(source: Source, names: BlockNames, name: str, inner: str) -> str:
    """Our part of a tensor's name within a block."""
    if inner in names.whole:
        return names.whole[inner]
    stem, _, kind = inner.rpartition(".")
    if stem in names.parts and kind in ("weight", "bias"):
        return f"{names.parts[stem]}.{kind}"
    what = next((words for pattern, words in _FOREIGN.items() if re.search(pattern, inner)), "no part of a block here")
    raise UserError(f"{source.place}: {name}: {what}, which this encoder does not have; choose other weights")


def _block(source: Source, number: int, parts: Mapping[str, str]) -> dict[str, tuple[Callable[[], Tensor], str]]:
    """One block's tensors under our names, each as a function, with a name in the file."""
    read = source.tensors
    whole = "qkv.weight" in parts
    needed = ["norm1.weight", "proj.weight", "norm2.weight", "fc1.weight", "fc2.weight"]
    for part in (*needed, *(["qkv.weight"] if whole else ["q.weight", "k.weight", "v.weight"])):
        if part not in parts:
            raise UserError(f"{source.place}: block {number} has no {part}; download it again")

    def tensor(part: str, size: int | None = None) -> Tensor:
        """A tensor of the file; zeros of a length where a bias is missing."""
        if part in parts:
            return read[parts[part]]
        assert size is not None
        return torch.zeros(size)

    def projections() -> Tensor:
        return read[parts["qkv.weight"]] if whole else torch.cat([tensor(f"{one}.weight") for one in "qkv"])

    def biases() -> Tensor:
        width = len(read[parts["norm1.weight"]])
        if "qkv.bias" in parts:
            bias = read[parts["qkv.bias"]]
            # DINOv3's training sets the keys' biases to 0 by a mask, whatever they are.
            return torch.where(read[parts["qkv.mask"]] != 0, bias, 0.0) if "qkv.mask" in parts else bias
        return torch.cat([tensor(f"{one}.bias", width).float() for one in "qkv"])

    def scaled(part: str, kind: str, scale: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            value = tensor(f"{part}.{kind}", len(read[parts[f"{part}.weight"]])).float()
            if scale not in parts:
                return value
            factor = read[parts[scale]].float()
            return value * (factor[:, None] if kind == "weight" else factor)

        return make

    def plain(part: str, kind: str) -> Callable[[], Tensor]:
        return lambda: tensor(f"{part}.{kind}", len(read[parts[f"{part}.weight"]]))

    qkv = parts.get("qkv.weight") or parts["q.weight"]
    made: dict[str, tuple[Callable[[], Tensor], str]] = {
        "attn.qkv.weight": (projections, qkv),
        "attn.qkv.bias": (biases, qkv),
    }
    for kind in ("weight", "bias"):
        made[f"norm1.{kind}"] = (plain("norm1", kind), parts["norm1.weight"])
        made[f"attn.proj.{kind}"] = (scaled("proj", kind, "scale1"), parts["proj.weight"])
        made[OUR_MLP[f"norm2.{kind}"]] = (plain("norm2", kind), parts["norm2.weight"])
        made[OUR_MLP[f"fc1.{kind}"]] = (plain("fc1", kind), parts["fc1.weight"])
        made[OUR_MLP[f"fc2.{kind}"]] = (scaled("fc2", kind, "scale2"), parts["fc2.weight"])
    return made
