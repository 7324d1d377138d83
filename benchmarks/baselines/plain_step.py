"""Reference implementation of an Image World Model's training step in plain PyTorch: the baseline of the whole step.

Dense batches, padded to the longest image and masked; standard modules and optimizer; nothing of `iwm_fast` is used.
A test asserts that it computes the same function as `iwm_fast.models.IWM` with `feature` conditioning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PlainBatch", "PlainIWM", "PlainShape", "PlainStep"]

_EPS = 1e-6
# Inductor's coalescing analysis does not support dynamic shapes (its configuration says so), and torch 2.11 to 2.14
# fail in it (pytorch/pytorch#197077).
_INDUCTOR: dict[str, str | int | bool | Callable[..., object]] = {"triton.coalesce_tiling_analysis": False}


@dataclass(frozen=True)
class PlainShape:
    """Sizes of the networks; the predictor has as many heads as the encoder."""

    image: int
    patch: int
    depth: int
    width: int
    heads: int
    predictor_depth: int
    predictor_width: int
    actions: int

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


@dataclass(frozen=True, eq=False)
class PlainBatch:
    """B images; rows of patch numbers padded to the longest, and bool masks that are True for real patches.

    source, target: float (B, 3, S, S), normalised. action: (B, A). context, predicted: int64 (B, Nc), (B, Nt);
    seen, asked: the bool masks of context and of predicted.
    """

    source: Tensor
    target: Tensor
    action: Tensor
    context: Tensor
    seen: Tensor
    predicted: Tensor
    asked: Tensor


def positions(width: int, grid: int) -> Tensor:
    """Return (1, L, D): sines and cosines of the column in the first half of the width, of the row in the second."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, D / 2)
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def take(tokens: Tensor, rows: Tensor) -> Tensor:
    """Gather rows: (B, L, D) and int64 (B, N) to (B, N, D)."""
    return torch.gather(tokens, 1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """(B, N, D) to the same; tokens attend only where `real`, bool (B, N), is True."""
        return self.feed(x + self.attend(self.norm1(x), real))

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Attention over normalised tokens."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if real is None else real[:, None, None, :]
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return out

    def feed(self, x: Tensor) -> Tensor:
        """Add the MLP's output to the residual stream."""
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """Vision transformer over the visible patches; masks apply after the patch embedding."""

    pos_embed: Tensor

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        self.register_buffer("pos_embed", positions(shape.width, shape.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=_EPS)

    def forward(self, images: Tensor, rows: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) and int64 (B, N) to (B, N, D); all patches without rows."""
        x = self.embed(images, rows)
        for block in self.blocks:
            x = block(x, real)
        out: Tensor = self.norm(x)
        return out

    def embed(self, images: Tensor, rows: Tensor | None) -> Tensor:
        """Embed all patches with their positions; then select those rows."""
        x: Tensor = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return x if rows is None else take(x, rows)


class Predictor(nn.Module):
    """Context and mask tokens in one sequence; the action is concatenated to each mask token and mixed in by an MLP."""

    pos_embed: Tensor

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        width = shape.predictor_width
        self.embed = nn.Linear(shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.mix = nn.Sequential(
            nn.Linear(width + shape.actions, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width),
        )  # fmt: skip
        self.register_buffer("pos_embed", positions(width, shape.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.predictor_depth))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.proj = nn.Linear(width, shape.width)

    def forward(self, z: Tensor, batch: PlainBatch) -> Tensor:
        """(B, Nc, De) to (B, Nt, De)."""
        x, real = self.tokens(z, batch), torch.cat([batch.seen, batch.asked], dim=1)
        for block in self.blocks:
            x = block(x, real)
        out: Tensor = self.proj(self.norm(x[:, z.shape[1] :]))
        return out

    def tokens(self, z: Tensor, batch: PlainBatch) -> Tensor:
        """(B, Nc + Nt, Dp): context tokens, then mask tokens."""
        position = self.pos_embed.expand(len(z), -1, -1)
        seen = self.embed(z) + take(position, batch.context)
        asked = self.mask_token + take(position, batch.predicted)
        action = batch.action[:, None].expand(-1, asked.shape[1], -1)
        return torch.cat([seen, self.mix(torch.cat([asked, action], dim=2))], dim=1)


class PlainIWM(nn.Module):
    """Context encoder, its EMA, predictor and loss."""

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.encoder = Encoder(shape)
        self.predictor = Predictor(shape)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, batch: PlainBatch) -> Tensor:
        """Return the mean squared distance over all predicted tokens."""
        wanted = self.wanted(batch)
        z = self.encoder(batch.source, batch.context, batch.seen)
        difference = (self.predictor(z, batch) - wanted).float().square().mean(2)
        out: Tensor = (difference * batch.asked).sum() / batch.asked.sum()
        return out

    @torch.no_grad()
    def wanted(self, batch: PlainBatch) -> Tensor:
        """Return (B, Nt, De): all patches encoded by the target, normalised, then the predicted ones selected."""
        target = self.target(batch.target)
        return take(F.layer_norm(target, target.shape[2:], eps=_EPS), batch.predicted)


class PlainStep:
    """AdamW with weight decay on matrices, cosine schedules, and the EMA of the target."""

    def __init__(self, model: PlainIWM, *, compiled: bool = False) -> None:
        self.model = model
        self._run = torch.compile(model, dynamic=True, options=_INDUCTOR) if compiled else model
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        self.done = 0

    def __call__(self, batch: PlainBatch) -> float:
        """Run one step; return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = 5e-4 * (1 + math.cos(math.pi * self.done / 1_000_000))
        device = batch.source.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = self._run(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        self.done += 1
        return float(loss.detach())

    @torch.no_grad()
    def average(self) -> None:
        """Update the EMA."""
        for average, weight in zip(self.model.target.parameters(), self.model.encoder.parameters(), strict=True):
            average.lerp_(weight, 0.004)
