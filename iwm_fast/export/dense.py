"""Encoder and predictor on whole images, for exported graphs: any batch size, no packing.

These modules hold the trained ones and use their parameters; they compute what `IWM.encode` and `IWM.predict` do, in
plain operators on (B, L, D) that an exporter can trace with B unknown.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast.models.attention import Attention
from iwm_fast.models.blocks import Block, ConditionedMlp
from iwm_fast.models.positions import rotation_table
from iwm_fast.models.predictors import FeatureMixer, MlpPredictor, VitPredictor
from iwm_fast.models.vit import VisionTransformer

__all__ = ["WholeEncoder", "WholePredictor"]


def _attention(module: Attention, x: Tensor, rotation: Tensor | None) -> Tensor:
    q, k, v = module.qkv(x).unflatten(2, (3, module.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d)
    if rotation is not None:
        q, k = _rotated(q, rotation), _rotated(k, rotation)
    return module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    (cos, sin), (a, b) = rotation.chunk(2, dim=1), x.chunk(2, dim=3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=3)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _mlp(module: ConditionedMlp, x: Tensor, action: Tensor | None) -> Tensor:
    hidden = F.linear(_normed(x, module.norm_weight, module.norm_bias, module.eps), module.w_in, module.b_in)
    if module.w_action is not None and action is not None:
        hidden = hidden + F.linear(action, module.w_action)[:, None]
    return x + F.linear(F.gelu(hidden), module.w_out, module.b_out)


def _blocks(blocks: nn.ModuleList, x: Tensor, action: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
    for block in blocks:
        if isinstance(block, Block):
            x = x + _attention(block.attn, _normed(x, block.norm1.weight, block.norm1.bias, block.norm1.eps), rotation)
            x = _mlp(block.mlp, x, action)
        elif isinstance(block, ConditionedMlp):
            x = _mlp(block, x, action)
    return x


def _mix(module: FeatureMixer, tokens: Tensor, action: Tensor) -> Tensor:
    hidden = F.linear(tokens, module.w_in, module.b_in) + F.linear(action, module.w_action)[:, None]
    return module.out(F.gelu(F.linear(F.gelu(hidden), module.w_out, module.b_out)))


class WholeEncoder(nn.Module):
    """uint8 RGB images (B, S, S, 3) to tokens (B, L, D)."""

    rotation: Tensor | None

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        told, weight = encoder.architecture, encoder.norm.weight
        table = None
        if told.positions == "rope":
            exact = torch.promote_types(weight.dtype, torch.float32)
            table = rotation_table(told.grid, encoder.width // encoder.heads, told.rope_base, weight.device, exact)
            table = F.pad(table.to(weight.dtype), (0, 0, told.prefix_tokens, 0))  # prefix tokens: by an angle of 0
            table[: told.prefix_tokens, : table.shape[1] // 2] = 1.0
        self.register_buffer("rotation", table, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of all patches, row-major, as `VisionTransformer` without `patches`."""
        encoder = self.encoder
        tokens = encoder.patch_embed(images).unflatten(0, (-1, encoder.patches))
        if encoder.pos_embed is not None:
            tokens = tokens + encoder.pos_embed.to(tokens.dtype)
        if encoder.prefix is None:
            return encoder.norm(_blocks(encoder.blocks, tokens, rotation=self.rotation))
        tokens = torch.cat([encoder.prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return encoder.norm(_blocks(encoder.blocks, tokens, rotation=self.rotation)[:, len(encoder.prefix) :])


class WholePredictor(nn.Module):
    """Predict the target's tokens (B, L, D) from those of one source (B, L, D) and the action (B, A)."""

    def __init__(self, predictor: VitPredictor | MlpPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, tokens: Tensor, action: Tensor) -> Tensor:
        """Return all patches of the target, as `IWM.predict`."""
        own = self.predictor
        x = own.embed(tokens)
        if isinstance(own, MlpPredictor):
            return own.proj(own.norm(_blocks(own.blocks, x, action)))
        positions = own.pos_embed.to(x.dtype)
        asked = (positions + own.mask_token).expand(x.shape[0], -1, -1)
        if own.feature is not None:
            asked = _mix(own.feature, asked, action)
        parts = [x + positions, asked]
        if own.sequence is not None:
            parts.append(torch.addcmul(own.sequence.bias, action[:, :, None], own.sequence.weight))
        patches = own.pos_embed.shape[0]
        joined = _blocks(own.blocks, torch.cat(parts, dim=1), action)
        return own.proj(own.norm(joined[:, patches : 2 * patches]))
