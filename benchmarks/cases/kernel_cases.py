"""Sizes at which the kernels are timed, taken from training; random inputs and the minimum bytes of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels import (
    conditioned_mlp_bytes,
    conditioned_mlp_flops,
    e4m3_rows_bytes,
    e4m3_rows_flops,
    ema_update_bytes,
    ema_update_flops,
    patchify_bytes,
    patchify_flops,
    predictor_input_bytes,
    predictor_input_flops,
    residual_norm_bytes,
    residual_norm_flops,
    rope_bytes,
    rope_flops,
    sigreg_sums_bytes,
    sigreg_sums_flops,
    stopgrad_l2_bytes,
    stopgrad_l2_flops,
)

__all__ = ["CASES", "OPERATIONS", "Case", "at_most", "inputs"]

OPERATIONS = (
    "conditioned_mlp", "stopgrad_l2", "ema_update", "patchify", "residual_norm", "predictor_input", "e4m3_rows",
    "sigreg_sums", "rope",
)  # fmt: skip
ELEMENT = 2  # bytes of bf16
_POSITIONS = 196


@dataclass(frozen=True)
class Case:
    """One operation at one size. hidden and actions are the MLP's; rows is the loss's table of targets.

    ema_update updates the tensors of `blocks` transformer blocks. For patchify, tokens are patches of `width` elements,
    of images `side` pixels wide; if they are all patches, there is no index.

    rows also means: for residual_norm, the branch added to the residual stream before LayerNorm (all rows or 0); for
    predictor_input, the mask tokens, whose `tokens` are the context's. For sigreg_sums, width is the directions and
    hidden the knots. For rope, hidden is the width of a head.
    """

    operation: str
    tokens: int
    width: int
    hidden: int = 0
    actions: int = 0
    images: int = 0
    rows: int = 0
    blocks: int = 0
    side: int = 0

    @property
    def name(self) -> str:
        """The case's label in tables."""
        if self.operation == "ema_update":
            return f"{self.operation} of {self.blocks} blocks D={self.width} H={self.hidden}"
        tails = {
            "conditioned_mlp": f" H={self.hidden} A={self.actions}",
            "stopgrad_l2": f" of {self.rows}",
            "residual_norm": " with a branch" if self.rows else "",
            "e4m3_rows": "",
            "sigreg_sums": f" directions, {self.hidden} knots",
            "rope": f" in heads of {self.hidden}",
            "predictor_input": f" and {self.rows} mask tokens",
            "patchify": f" of {self.images} images of {self.side}²",
        }
        return f"{self.operation} N={self.tokens} D={self.width}{tails[self.operation]}"

    @property
    def patch(self) -> int:
        """Patch size in pixels."""
        return math.isqrt(self.width // 3)

    @property
    def patches(self) -> int:
        """All patches of all images."""
        return self.images * (self.side // self.patch) ** 2

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the EMA's tensors: per block two attention layers, two MLP layers and two LayerNorms."""
        d, h = self.width, self.hidden
        block = [(3 * d, d), (3 * d,), (d, d), (d,), (h, d), (h,), (d, h), (d,), *[(d,)] * 4]
        return block * self.blocks

    def counts(self, backward: bool) -> dict[str, int]:
        """Return FLOPs and minimum bytes of the forward pass, or of forward and backward."""
        if self.operation == "stopgrad_l2":
            return {
                "flops": stopgrad_l2_flops(self.tokens, self.width, normalize_target=True),
                "bytes": stopgrad_l2_bytes(self.tokens, self.width, element=ELEMENT, gradient=backward),
            }
        if self.operation == "ema_update":
            elements = sum(math.prod(shape) for shape in self.shapes)
            return {"flops": ema_update_flops(elements), "bytes": ema_update_bytes(elements, copy=ELEMENT)}
        if self.operation == "patchify":
            indexed = self.tokens < self.patches
            moved = patchify_bytes(self.tokens, self.patch, element=ELEMENT, indexed=indexed)
            return {"flops": patchify_flops(self.tokens, self.patch), "bytes": moved}
        if self.operation == "e4m3_rows":
            moved = e4m3_rows_bytes(self.tokens, self.width, element=ELEMENT)
            return {"flops": e4m3_rows_flops(self.tokens, self.width), "bytes": moved}
        counted = [self._pass(which) for which in ((False, True) if backward else (False,))]
        return {"flops": sum(flops for flops, _ in counted), "bytes": sum(moved for _, moved in counted)}

    def _pass(self, backward: bool) -> tuple[int, int]:
        """FLOPs and minimum bytes of one pass of an operation with gradients."""
        n, d = self.tokens, self.width
        if self.operation == "residual_norm":
            options: dict[str, Any] = {"branch": self.rows > 0, "backward": backward}
            return residual_norm_flops(n, d, **options), residual_norm_bytes(n, d, **options, element=ELEMENT)
        if self.operation == "sigreg_sums":
            j = self.hidden
            return sigreg_sums_flops(n, d, j, backward=backward), sigreg_sums_bytes(n, d, j, backward=backward)
        if self.operation == "rope":
            moved = rope_bytes(n, d, backward=backward, element=ELEMENT, packed=False)
            return rope_flops(n, d, backward=backward), moved
        if self.operation == "predictor_input":
            m = self.rows
            moved = predictor_input_bytes(n, m, 0, d, backward=backward, element=ELEMENT)
            return predictor_input_flops(n, m, d, backward=backward), moved
        sizes = (n, d, self.hidden, d)
        extra: dict[str, Any] = {"images": self.images, "actions": self.actions, "backward": backward}
        return conditioned_mlp_flops(*sizes, **extra), conditioned_mlp_bytes(*sizes, **extra, element=ELEMENT)


CASES = [
    Case("conditioned_mlp", 100_352, 384, 1536, 16, 512),  # predictor, ViT-B: 512 images of 196 tokens
    Case("conditioned_mlp", 100_352, 384, 1536, 0),
    Case("conditioned_mlp", 100_352, 192, 768, 16, 512),
    Case("conditioned_mlp", 50_176, 768, 3072, 0),  # encoders
    Case("conditioned_mlp", 50_176, 1024, 4096, 0),
    Case("conditioned_mlp", 25_088, 1280, 5120, 0),
    Case("stopgrad_l2", 100_352, 768, rows=200_704),
    Case("stopgrad_l2", 100_352, 1024, rows=200_704),
    Case("ema_update", 0, 768, 3072, blocks=12),  # ViT-B
    Case("ema_update", 0, 1024, 4096, blocks=24),  # ViT-L
    Case("patchify", 50_176, 768, images=1024, side=224),  # a quarter of the patches: a source's context
    Case("patchify", 200_704, 768, images=1024, side=224),  # all patches: a target
    Case("residual_norm", 100_352, 384),  # the predictor's blocks; below, with the branch not yet added
    Case("residual_norm", 100_352, 384, rows=100_352),
    Case("residual_norm", 50_176, 768),
    Case("residual_norm", 50_176, 768, rows=50_176),
    Case("predictor_input", 30_720, 384, images=512, rows=69_632),
    Case("e4m3_rows", 50_176, 768),  # a target in fp8: inputs of a block's first GEMMs, and the MLP's hidden
    Case("e4m3_rows", 50_176, 3072),
    Case("rope", 50_176, 768, 64),  # a block of ViT-B; the gradients of q, k and v are three tensors
    Case("sigreg_sums", 25_088, 512, 8),  # ViT-B: half of the patches of 256 images
]


def inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Return new leaf tensors; weights are scaled so that activations stay near 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, size: float = 1.0, leaf: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * size
        return values.to(dtype).requires_grad_(leaf)

    n, d, h = case.tokens, case.width, case.hidden
    if case.operation == "ema_update":
        averages, weights = (
            [torch.randn(*shape, generator=generator, device=device) for shape in case.shapes] for _ in range(2)
        )
        copies = [torch.zeros_like(average, dtype=dtype) for average in averages]
        # At a momentum of 0.5 a kernel that does nothing is wrong; training's 0.996 takes as long.
        return {"averages": averages, "weights": weights, "momentum": 0.5, "copies": copies}
    if case.operation == "patchify":
        shape, every = (case.images, case.side, case.side, 3), case.patches // max(case.images, 1)
        images = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
        scale, shift = torch.randn(2, d, generator=generator, device=device).div_(64)
        given = {"images": images, "patch": case.patch, "scale": scale, "shift": shift, "dtype": dtype}
        wanted = torch.randperm(case.patches, generator=generator, device=device)[:n].sort().values
        chosen = {"patches": wanted % every, "image_of_token": wanted // every}
        return given if n == case.patches else given | chosen
    if case.operation == "stopgrad_l2":
        index = torch.randint(0, case.rows, (n,), generator=generator, device=device)
        return {"pred": draw(n, d), "target": draw(case.rows, d, leaf=False), "index": index}
    if case.operation == "residual_norm":
        branch = draw(n, d) if case.rows else None
        return {"x": draw(n, d), "branch": branch, "weight": draw(d), "bias": draw(d, size=0.1)}
    if case.operation in ("e4m3_rows", "sigreg_sums"):
        rows = torch.randn(n, d, generator=generator, device=device)
        # SIGReg's are in fp32, whatever the others are in.
        projected = {"p": rows.requires_grad_(), "spacing": 3 / max(h, 1), "knots": h}
        return {"x": rows.detach().to(dtype)} if case.operation == "e4m3_rows" else projected
    if case.operation == "rope":
        angles = 6 * torch.rand(_POSITIONS, h // 2, generator=generator, device=device)
        return {
            "qkv": draw(n, 3, d // h, h), "table": torch.cat([angles.cos(), angles.sin()], dim=1),
            "patches": torch.randint(-1, _POSITIONS, (n,), generator=generator, device=device),
        }  # fmt: skip
    if case.operation == "predictor_input":
        patches = torch.randint(0, _POSITIONS, (n + case.rows,), generator=generator, device=device)
        images_of = [torch.arange(count, device=device) * case.images // count for count in (n, case.rows)]
        return {
            "context": draw(n, d), "context_patches": patches[:n], "position": draw(_POSITIONS, d, leaf=False),
            "place": torch.cat(images_of).argsort(stable=True).argsort(), "mask_token": draw(d),
            "predicted_patches": patches[n:],
        }  # fmt: skip
    given = {
        "x": draw(n, d),
        "w_in": draw(h, d, size=d**-0.5),
        "b_in": draw(h, size=0.1),
        "w_out": draw(d, h, size=h**-0.5),
        "b_out": draw(d, size=0.1),
        "norm_weight": draw(d),
        "norm_bias": draw(d, size=0.1),
    }
    if case.actions:
        bounds = torch.linspace(0, n, case.images + 1, device=device).round().to(torch.int32)
        given |= {
            "action": draw(case.images, case.actions, leaf=False),
            "w_action": draw(h, case.actions, size=case.actions**-0.5),
            "cu_seqlens": bounds,
        }
    return given


def at_most(case: Case, tokens: int, images: int, rows: int, blocks: int) -> Case:
    """Return the case with the same widths and at most these sizes."""
    fewer = replace(
        case, tokens=min(case.tokens, tokens), images=min(case.images, images), rows=min(case.rows, rows),
        blocks=min(case.blocks, blocks),
    )  # fmt: skip
    # A case of all patches stays one, over fewer whole images.
    everything = case.operation == "patchify" and case.tokens == case.patches
    return replace(fewer, tokens=fewer.patches) if everything else fewer
