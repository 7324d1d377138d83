"""A second, plain implementation: float64, image by image, einsum and loops, from timm's parameter names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iwm_fast.config.schema import ModelConfig
from iwm_fast.export.timm_names import to_timm
from iwm_fast.models import IWM, Segments, VisionTransformer

State = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-6) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / torch.sqrt((centred**2).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight + bias


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return torch.einsum("nd,hd->nh", x, state[name + ".weight"]) + state[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one image, (n, heads, d)."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("hnm,mhd->nhd", weights / weights.sum(-1, keepdim=True), v)


def block(x: Tensor, state: State, name: str, heads: int, action: Tensor | None = None) -> Tensor:
    """A pre-norm block with timm's names, for one image; "mlp.w_action" conditions it on the action."""
    y = norm(x, state[name + "norm1.weight"], state[name + "norm1.bias"])
    q, k, v = linear(y, state, name + "attn.qkv").reshape(len(x), 3, heads, -1).unbind(1)
    x = x + linear(attention(q, k, v).reshape(len(x), -1), state, name + "attn.proj")
    return mlp(x, state, name, action)


def mlp(x: Tensor, state: State, name: str, action: Tensor | None = None) -> Tensor:
    y = norm(x, state[name + "norm2.weight"], state[name + "norm2.bias"])
    hidden = linear(y, state, name + "mlp.fc1")
    if action is not None and name + "mlp.w_action" in state:
        hidden = hidden + state[name + "mlp.w_action"] @ action
    return x + linear(gelu(hidden), state, name + "mlp.fc2")


def depth_of(state: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def position(width: int, column: int, row: int) -> Tensor:
    """Return sines and cosines of one patch, one frequency after another."""
    quarter = width // 4
    values = [
        f(place / 10000 ** (i / quarter))
        for place in (column, row)
        for f in (math.sin, math.cos)
        for i in range(quarter)
    ]
    return torch.tensor(values, dtype=torch.float64)


def vit(state: State, image: Tensor, heads: int, patches: list[int]) -> Tensor:
    """timm's VisionTransformer.forward_features without class token: uint8 (S, S, 3) → (n, D)."""
    weight = state["patch_embed.proj.weight"]
    side, grid = weight.shape[-1], image.shape[0] // weight.shape[-1]
    pixels = (image.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    tokens = []
    for patch in patches:
        top, left = patch // grid * side, patch % grid * side
        cut = pixels[top : top + side, left : left + side]
        token = torch.einsum("yxc,dcyx->d", cut, weight) + state["patch_embed.proj.bias"]
        tokens.append(token + state["pos_embed"][0, patch])
    if not tokens:
        return weight.new_zeros(0, weight.shape[0])
    x = torch.stack(tokens)
    for i in range(depth_of(state)):
        x = block(x, state, f"blocks.{i}.", heads)
    return norm(x, state["norm.weight"], state["norm.bias"])


def rotated(x: Tensor, angles: list[float]) -> Tensor:
    """Rotate one token's heads (h, d): the pairs (i, i + d / 2), by one angle each."""
    half = len(angles)
    out = x.clone()
    for i, angle in enumerate(angles):
        a, b = x[:, i], x[:, i + half]
        out[:, i], out[:, i + half] = (
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        )
    return out


def rope_angles(patch: int, grid: int, head: int, base: float) -> list[float]:
    """DINOv3's: the row's angles, then the column's, of coordinates in [−1, 1]."""
    periods = [base ** (4 * i / head) for i in range(head // 4)]
    centres = [2 * (place + 0.5) / grid - 1 for place in (patch // grid, patch % grid)]
    return [2 * math.pi * centre / period for centre in centres for period in periods]


def dense_encoder(model: VisionTransformer, image: Tensor, patches: list[int]) -> Tensor:
    """All tokens of one image (P + n, D), by an encoder's parameters and architecture."""
    told, own = model.architecture, dict(model.state_dict(keep_vars=True))
    state, prefix = as_timm(own, ""), own.get("prefix")
    weight, side = state["patch_embed.proj.weight"], told.patch
    # With the rounding of tables made in fp32: everything else is exact.
    pixels = image.double() * model.patch_embed.scale[:3] + model.patch_embed.shift[:3]
    tokens = [] if prefix is None else list(prefix)
    for patch in patches:
        top, left = patch // told.grid * side, patch % told.grid * side
        cut = pixels[top : top + side, left : left + side]
        token = torch.einsum("yxc,dcyx->d", cut, weight) + state["patch_embed.proj.bias"]
        if told.positions == "learned":
            token = token + state["pos_embed"][patch]
        elif told.positions == "sincos":
            token = token + position(told.shape.width, patch % told.grid, patch // told.grid).float()
        tokens.append(token)
    if not tokens:
        return weight.new_zeros(0, weight.shape[0])
    x, head = torch.stack(tokens), told.shape.width // told.shape.heads
    for i in range(told.shape.depth):
        name = f"blocks.{i}."
        y = norm(x, state[name + "norm1.weight"], state[name + "norm1.bias"], told.norm_eps)
        q, k, v = linear(y, state, name + "attn.qkv").reshape(len(x), 3, told.shape.heads, -1).unbind(1)
        if told.positions == "rope":
            before = len(x) - len(patches)
            turns = [rope_angles(patch, told.grid, head, told.rope_base) for patch in patches]
            q, k = (torch.stack([*part[:before], *map(rotated, part[before:], turns)]) for part in (q, k))
        x = x + linear(attention(q, k, v).reshape(len(x), -1), state, name + "attn.proj")
        y = norm(x, state[name + "norm2.weight"], state[name + "norm2.bias"], told.norm_eps)
        x = x + linear(gelu(linear(y, state, name + "mlp.fc1")), state, name + "mlp.fc2")
    return norm(x, state["norm.weight"], state["norm.bias"], told.norm_eps)


def predictor(
    state: State,
    z: Tensor,
    context: list[int],
    predicted: list[int],
    action: Tensor,
    heads: int,
    grid: int,
    ages: list[int] | None = None,
) -> Tensor:
    """Return one image's prediction; the conditioning follows from the parameters that exist. ages: of z's tokens."""
    width = state["mask_token"].shape[0]
    places = [position(width, p % grid, p // grid) for p in range(grid * grid)]
    tokens = [row + places[p] for row, p in zip(linear(z, state, "embed"), context, strict=True)]
    if ages is not None:
        tokens = [token + state["time_embed"][age] for token, age in zip(tokens, ages, strict=True)]
    for patch in predicted:
        token = state["mask_token"] + places[patch]
        if "feature.w_in" in state:
            both = torch.cat([state["feature.w_in"], state["feature.w_action"]], dim=1)
            hidden = gelu(both @ torch.cat([token, action]) + state["feature.b_in"])
            hidden = gelu(state["feature.w_out"] @ hidden + state["feature.b_out"])
            token = state["feature.out.weight"] @ hidden + state["feature.out.bias"]
        tokens.append(token)
    if "sequence.weight" in state:
        tokens += [
            value * w + b for value, w, b in zip(action, state["sequence.weight"], state["sequence.bias"], strict=True)
        ]
    if not predicted:
        return z.new_zeros(0, z.shape[1])
    x = torch.stack(tokens)
    for i in range(depth_of(state)):
        x = block(x, state, f"blocks.{i}.", heads, action)
    x = norm(x, state["norm.weight"], state["norm.bias"])[len(context) : len(context) + len(predicted)]
    return linear(x, state, "proj")


def mlp_predictor(state: State, z: Tensor, action: Tensor) -> Tensor:
    x = linear(z, state, "embed")
    for i in range(depth_of(state)):
        x = mlp(x, state, f"blocks.{i}.", action)
    return linear(norm(x, state["norm.weight"], state["norm.bias"]), state, "proj")


def as_timm(state: State, prefix: str) -> dict[str, Tensor]:
    """Return a predictor's parameters with its blocks under timm's names. An mlp predictor's blocks are MLPs alone."""
    names = {"norm_weight": "norm2.weight", "norm_bias": "norm2.bias", "w_in": "mlp.fc1.weight", "b_in": "mlp.fc1.bias"}
    names |= {"w_out": "mlp.fc2.weight", "b_out": "mlp.fc2.bias", "w_action": "mlp.w_action"}
    renamed = {}
    for full, value in state.items():
        if not full.startswith(prefix):
            continue
        parts = full.removeprefix(prefix).split(".")
        if parts[0] == "blocks" and parts[-1] in names:
            parts = [*parts[:2], names[parts[-1]]]
        renamed[".".join(parts)] = value
    return renamed


def iwm_loss(model: IWM, state: State, batch: Batch) -> Tensor:
    """Return Σ‖prediction − target‖², image by image; gradients flow to `state`'s tensors but through no target."""
    config = model.config
    heads, grid = config.encoder_shape.heads, config.grid
    encoder = to_timm({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}, grid)
    target = encoder
    if model.target_encoder is not None:
        target = to_timm(
            {k.removeprefix("target_encoder."): v for k, v in state.items() if k.startswith("target_encoder.")}, grid
        )
    target = {name: value.detach() for name, value in target.items()}
    world = as_timm(state, "predictor.")
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch.source)):
        z = vit(encoder, batch.source[i], heads, batch.context[i])
        wanted = vit(target, batch.target[i], heads, list(range(grid * grid)))[batch.predicted[i]]
        if config.normalize_target:
            wanted = norm(wanted)
        if config.predictor.kind == "mlp":
            got = mlp_predictor(world, z, batch.action[i])
        else:
            pair = (batch.context[i], batch.predicted[i])
            got = predictor(world, z, *pair, batch.action[i], config.predictor.head_count, grid)
        total = total + ((got - wanted) ** 2).sum()
    return total


@dataclass
class Batch:
    """A batch as lists of patch numbers per image, and packed for the model."""

    source: Tensor
    target: Tensor
    action: Tensor
    context: list[list[int]]
    predicted: list[list[int]]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Segments, Tensor, Segments]:
        return self.source, self.target, self.action, *pack(self.context), *pack(self.predicted)

    def take(self, images: list[int]) -> Batch:
        return Batch(
            self.source[images],
            self.target[images],
            self.action[images],
            [self.context[i] for i in images],
            [self.predicted[i] for i in images],
        )


def pack(patches: list[list[int]]) -> tuple[Tensor, Segments]:
    flat = [patch for image in patches for patch in image]
    return torch.tensor(flat, dtype=torch.int64), Segments.from_lengths([len(image) for image in patches])


def draw_batch(config: ModelConfig, action_dim: int, context: list[int], predicted: list[int], seed: int = 0) -> Batch:
    """Return random images, actions and disjoint patches of the given counts."""
    rng = np.random.default_rng(seed)
    images, patches = len(context), config.grid**2
    orders = [rng.permutation(patches).tolist() for _ in range(images)]
    shape = (2, images, config.image, config.image, 3)
    source, target = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    seen = [sorted(o[:n]) for o, n in zip(orders, context, strict=True)]
    asked = [sorted(o[n : n + m]) for o, n, m in zip(orders, context, predicted, strict=True)]
    if config.predictor.kind == "mlp":
        asked = seen
    return Batch(source, target, torch.from_numpy(rng.normal(size=(images, action_dim))), seen, asked)


def exact_model(config: ModelConfig, action_dim: int, **options: bool) -> IWM:
    """Return a float64 model in which every parameter matters: none is zero or one, and scales are of size 1.

    Buffers made in fp32 (positions, mean, std) keep its rounding.
    """
    torch.manual_seed(0)
    model = IWM(config, action_dim, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model
