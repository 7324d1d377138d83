"""Run I-JEPA's step built from timm's parts, as lightly composes it: timm's encoder and blocks with fused attention.

The encoder drops masked patches after the patch embedding; the predictor runs once per block with the context repeated;
the optimizer is PyTorch's fused AdamW. This is what a user of timm or lightly trains with today.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast.benchmarks.adapters.inputs import Inputs, Shape, SideMissing, fingerprint, normalised
from iwm_fast.benchmarks.baselines.plain_step import positions, take
from iwm_fast.config.schema import ENCODERS
from iwm_fast.measure.flop_count import counted_flops

__all__ = ["TimmJepa", "TimmStep", "import_timm", "operations"]


def import_timm() -> Any:
    """Return timm's vision transformer module. Raise SideMissing if it is not installed or does not import."""
    try:
        return importlib.import_module("timm.models.vision_transformer")
    except ImportError as error:
        raise SideMissing(f"timm does not import: {error}") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # torchvision's wheel is built for CUDA, and its library does not load beside the CPU's torch. What timm needs of it
    # is Python, which only requires its operators to be declared.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError) as error:
        raise SideMissing(f"timm does not import: {error}") from error


class TimmJepa(nn.Module):
    """Encoder, EMA target and predictor; `forward` returns the loss."""

    position: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        vit, size, width = import_timm(), ENCODERS[shape.encoder], shape.predictor_width
        self.encoder = vit.VisionTransformer(
            img_size=shape.image, patch_size=shape.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads,
            num_classes=0, class_token=False, global_pool="avg", fc_norm=False,
        )  # fmt: skip
        self.encoder.pos_embed.requires_grad = False
        self.encoder.pos_embed.data.copy_(positions(size.width, shape.grid))
        self.embed = nn.Linear(size.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("position", positions(width, shape.grid), persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(vit.Block(width, shape.heads, qkv_bias=True, norm_layer=norm) for _ in range(shape.predictor_depth))
        )
        self.norm = norm(width)
        self.proj = nn.Linear(width, size.width)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def encode(self, images: Tensor, rows: Tensor) -> Tensor:
        """(B, 3, S, S) and int64 (B, N) to (B, N, D)."""
        x = self.encoder.patch_embed(images) + self.encoder.pos_embed
        out: Tensor = self.encoder.norm(self.encoder.blocks(take(x, rows)))
        return out

    def predict(self, z: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """(B, Nc, De), int64 (B, Nc) and (K, B, Np) to (K · B, Np, De)."""
        position = self.position.expand(len(z), -1, -1)
        seen = (self.embed(z) + take(position, context)).repeat(len(blocks), 1, 1)
        asked = torch.cat([self.mask_token + take(position, block) for block in blocks])
        out: Tensor = self.proj(self.norm(self.blocks(torch.cat([seen, asked], dim=1))[:, seen.shape[1] :]))
        return out

    def forward(self, images: Tensor, context: Tensor, blocks: Tensor) -> Tensor:
        """Return the smooth L1 loss against the normalised target, over all blocks."""
        with torch.no_grad():
            h = self.target.forward_features(images)
            h = F.layer_norm(h, (h.size(-1),))
            h = torch.cat([take(h, block) for block in blocks])
        return F.smooth_l1_loss(self.predict(self.encode(images, context), context, blocks), h)


class TimmStep:
    """timm's step on given batches."""

    name = "timm"

    def __init__(self, shape: Shape, inputs: Sequence[Inputs], device: torch.device) -> None:
        import_timm()
        self.version = importlib.import_module("timm").__version__
        self.model = TimmJepa(shape).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, fused=True)
        self._batches = [_batch(one, device) for one in inputs]
        self._next = 0

    def step(self) -> float:
        """Run one step; return the loss."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        device = batch[0].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(
                self.model.target.parameters(), self.model.encoder.parameters(), strict=True
            ):  # fmt: skip
                average.lerp_(weight, 0.004)
        return float(loss.detach())

    def saw(self) -> list[str]:
        """Return fingerprints of the batches' masks."""
        return [
            fingerprint(list(context.cpu().numpy()), list(torch.cat(list(blocks), dim=1).cpu().numpy()))
            for _, context, blocks in self._batches
        ]


def _batch(inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    context, blocks = (torch.from_numpy(rows).to(device) for rows in (inputs.masks.context, inputs.masks.blocks))
    return normalised(inputs.target.to(device)), context, blocks


def operations(shape: Shape, inputs: Sequence[Inputs]) -> list[int]:
    """Return the step's FLOPs on each of `inputs`, which are on the meta device."""
    device = torch.device("meta")
    with device:
        model = TimmJepa(shape)
    return [counted_flops(lambda one=one: model(*_batch(one, device)).backward()) for one in inputs]  # type: ignore[misc]
