"""DINOv2, with registers and without, under its own names.

As timm's, but ``register_tokens`` follow the class token without positions, and blocks may be in chunks
(``blocks.0.7.…``). Its own code interpolates positions by another rule with registers than without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iwm_fast.families.blocks import TIMM_BLOCKS, BlockNames
from iwm_fast.families.converted import IMAGENET, Converted, Source
from iwm_fast.families.network import Parts, assemble

__all__ = ["matches", "to_ours"]

BLOCKS = BlockNames(
    r"blocks\.(?:\d+\.(?=\d))?(\d+)\.", TIMM_BLOCKS.parts, {"ls1.gamma": "scale1", "ls2.gamma": "scale2"}
)


def matches(names: Mapping[str, Any]) -> bool:
    """Return whether these are DINOv2's own names."""
    own = {"cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight"} <= names.keys()
    return own and any(name.startswith("blocks.") and name.endswith(".ls1.gamma") for name in names)


def to_ours(source: Source) -> Converted:
    """Return DINOv2's encoder as ours. Raises UserError."""
    registers = "register_tokens" in source.tensors
    return assemble(
        source,
        Parts(
            family="DINOv2 with registers" if registers else "DINOv2", blocks=BLOCKS, patch="patch_embed.proj",
            norm="norm", tokens=("cls_token", *(["register_tokens"] if registers else [])), positions="pos_embed",
            embedded=1, eps=1e-6, heads=None, pixels=IMAGENET,
            rule="antialiased bicubic" if registers else "bicubic with an offset of 0.1",
        ),
    )  # fmt: skip
