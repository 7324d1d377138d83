"""A plain reference training of an Image World Model, and iwm-fast's parts to substitute into it, one at a time.

The reference is `benchmarks.baselines.plain_step`: standard PyTorch modules over padded images, every patch embedded
and then selected, the target's whole forward pass and then its rows, a lerp per weight, torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from small_run import small_config
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from iwm_fast import kernels
from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.adapters.inputs import normalised
from iwm_fast.benchmarks.adapters.plain import plain_state
from iwm_fast.benchmarks.baselines.plain_step import Block, Encoder, PlainBatch, PlainIWM, PlainShape, PlainStep, take
from iwm_fast.config import Config
from iwm_fast.data.batch import Batch
from iwm_fast.data.masks import MaskSampler, PatchSets
from iwm_fast.models import IWM, Segments
from iwm_fast.models import blocks as packed
from iwm_fast.models.attention import packed_attention
from iwm_fast.models.blocks import NORM_EPS, Kept, run_blocks
from iwm_fast.models.iwm import IWMOutput
from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD, PatchEmbedding

__all__ = [
    "PARTS",
    "PlainModule",
    "draw_batches",
    "halved",
    "plain_batch",
    "plain_model",
    "plain_training",
    "run_config",
]

IMAGES = 8

# What a part replaces in the reference: an object, the name of its method, and the function in its place.
Replacements = Iterator[tuple[object, str, Callable[..., Any]]]


def run_config(**changes: object) -> Config:
    """Return a run's configuration with the constants of `PlainStep`, on 8 x 8 patches; everything else as shipped."""
    network = {"depth": 2, "width": 32, "heads": 2}
    constants: dict[str, object] = {
        "model__encoder": network, "model__predictor": {**network, "conditioning": "feature"},
        "model__patch": 4, "train__lr": 1e-3, "train__lr_final": 0.0, "train__warmup": 0,
        "train__weight_decay": [0.05, 0.05], "train__ema": [0.996, 0.996], "train__global_batch": IMAGES,
    }  # fmt: skip
    return small_config("unused", **(constants | changes))


def draw_batches(config: Config, count: int, sources: int = 1) -> list[Batch]:
    """Return batches of noise with masks as in training."""
    sampler = MaskSampler(config.masks, config.model.grid, config.train.seed, sources=sources)
    generator = torch.Generator().manual_seed(1)
    images, side = IMAGES // sources, config.model.image
    batches = []
    for step in range(count):
        ids = np.arange(step * images, (step + 1) * images)
        source, target = (
            torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator) for n in (IMAGES, images)
        )
        action = torch.randn(IMAGES, ActionSpace().dim, generator=generator)
        patches = sampler.draw(np.zeros_like(ids), ids)
        totals = len(patches.context), len(patches.target)
        batches.append(Batch(source, target, action, patches, ids, np.zeros_like(ids), *totals))
    return batches


def halved(batch: Batch) -> list[Batch]:
    """Split the global batch into two micro-batches."""
    middle, found = len(batch) // 2, []
    for half in (slice(0, middle), slice(middle, None)):
        context, target = (_rows(batch.patches, which)[half] for which in ("context", "target"))
        lengths = [np.array([len(row) for row in rows]) for rows in (context, target)]
        patches = PatchSets(np.concatenate(context), lengths[0], np.concatenate(target), lengths[1])
        views = batch.source[half], batch.target[half], batch.action[half]
        found.append(
            Batch(*views, patches, batch.ids[half], batch.epochs[half], batch.global_context, batch.global_target)
        )
    return found


def _rows(patches: PatchSets, which: str) -> list[np.ndarray]:
    lengths = getattr(patches, f"{which}_lengths")
    return np.split(getattr(patches, which), np.cumsum(lengths)[:-1])


def plain_batch(batch: Batch) -> PlainBatch:
    """Return a padded float batch; a target of several sources occurs once per source."""
    dense = []
    for which in ("context", "target"):
        rows = [torch.from_numpy(row) for row in _rows(batch.patches, which)]
        dense += [pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(r) for r in rows], True).bool()]
    target = batch.target.repeat_interleave(len(batch.source) // len(batch.target), dim=0)
    return PlainBatch(normalised(batch.source), normalised(target), batch.action, *dense)


def plain_model(config: Config) -> PlainIWM:
    """Return the plain network with the initial weights of this configuration."""
    torch.manual_seed(config.train.seed)
    actions = ActionSpace().dim
    ours, encoder, predictor = IWM(config.model, actions), config.model.encoder_shape, config.model.predictor
    model = PlainIWM(
        PlainShape(
            config.model.image, config.model.patch, encoder.depth, encoder.width, encoder.heads, predictor.depth,
            predictor.width, actions,
        )
    )  # fmt: skip
    model.load_state_dict(plain_state(ours.state_dict()))
    return model


def plain_training(config: Config, batches: Sequence[Batch], steps: int, part: str | None = None) -> list[float]:
    """Return losses of plain steps, with one of `PARTS` substituted."""
    step = PlainStep(plain_model(config))
    replacements = list(PARTS[part](step)) if part is not None else []
    used: set[int] = set()

    def noting(i: int, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (used.add(i), function(*args))[1]

    for i, (owner, name, function) in enumerate(replacements):
        setattr(owner, name, noting(i, function))
    dense = [plain_batch(batch) for batch in batches]
    losses = [step(dense[i % len(dense)]) for i in range(steps)]
    assert len(used) == len(replacements), "what was replaced is not what runs"
    return losses


class PlainModule(nn.Module):
    """The plain network with the names and arguments that the engine uses."""

    def __init__(self, model: PlainIWM) -> None:
        super().__init__()
        self.encoder, self.target_encoder, self.predictor = model.encoder, model.target, model.predictor
        self.predicts = "target"
        self._plain = [model]  # not a child module: its parameters have names already

    def forward(
        self, source: Tensor, target: Tensor, action: Tensor, context: Tensor, seen: Segments, predicted: Tensor,
        asked: Segments, sampled: tuple[Tensor, ...], factors: tuple[float, ...],
    ) -> IWMOutput:  # fmt: skip
        assert sampled == ()
        lengths = [np.array(segments.lengths) for segments in (seen, asked)]
        patches = PatchSets(context.numpy(), lengths[0], predicted.numpy(), lengths[1])
        ids = np.arange(len(target))
        loss = self._plain[0](plain_batch(Batch(source, target, action, patches, ids, ids, seen.total, asked.total)))
        width = self.predictor.proj.out_features
        # The mean over this micro-batch, as the engine's share of the global one.
        loss = loss * (asked.total * width * factors[0])
        return IWMOutput(loss, loss.detach(), asked.total, target.new_zeros(2, width).float(), asked.image_of_token[:2])


def _levels(images: Tensor) -> Tensor:
    """Return the uint8 pixels behind `normalised` images."""
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _share(ours: nn.Module, plain: nn.Module) -> None:
    """Make one of our modules share the plain one's parameters."""
    theirs = dict(plain.named_parameters())
    for name, parameter in list(ours.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        (known_as,) = plain_state({name: parameter})
        setattr(ours.get_submodule(owner), leaf, theirs[known_as])


def _encoders(step: PlainStep) -> tuple[Encoder, Encoder]:
    return step.model.encoder, step.model.target


def _blocks(step: PlainStep) -> list[Block]:
    return [*step.model.encoder.blocks, *step.model.target.blocks, *step.model.predictor.blocks]


def _embedding(encoder: Encoder) -> PatchEmbedding:
    projection = encoder.patch_embed
    embedding = PatchEmbedding(projection.kernel_size[0], projection.out_channels)
    _share(embedding.proj, projection)
    return embedding


def patchify(step: PlainStep) -> Replacements:
    """Cut and normalise all patches with our operator, embed, then select."""
    for encoder in _encoders(step):

        def embed(images: Tensor, rows: Tensor | None, encoder: Encoder, ours: nn.Module) -> Tensor:
            x = ours(_levels(images)).unflatten(0, (len(images), -1)) + encoder.pos_embed
            return x if rows is None else take(x, rows)

        yield encoder, "embed", partial(embed, encoder=encoder, ours=_embedding(encoder))


def visible_patches(step: PlainStep) -> Replacements:
    """Drop invisible patches before the embedding."""
    encoder, ours = step.model.encoder, _embedding(step.model.encoder)

    def embed(images: Tensor, rows: Tensor) -> Tensor:
        image = torch.arange(len(images)).repeat_interleave(rows.shape[1])
        x = ours(_levels(images), rows.flatten(), image).unflatten(0, rows.shape)
        return x + take(encoder.pos_embed.expand(len(images), -1, -1), rows)

    yield encoder, "embed", embed


def packed_lengths(step: PlainStep) -> Replacements:
    """Packed attention, one call for all images of a length."""
    for block in _blocks(step):

        def attend(x: Tensor, real: Tensor | None, block: Block = block) -> Tensor:
            real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
            q, k, v = block.qkv(x[real]).unflatten(1, (3, block.heads, -1)).unbind(1)
            mixed = packed_attention(q, k, v, Segments.from_lengths(real.sum(1).numpy()), "sdpa")
            return torch.zeros_like(x).masked_scatter(real[:, :, None], block.proj(mixed.flatten(1)))

        yield block, "attend", attend


def _last_block(block: Block) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Our block whose last layers compute only some tokens: (B, N, D) and two bool (B, N) to packed ones."""
    ours = packed.Block(block.norm1.normalized_shape[0], block.heads, 4.0, "sdpa")
    _share(ours, block)

    def run(x: Tensor, real: Tensor, wanted: Tensor) -> Tensor:
        kept = Kept(wanted[real].nonzero().flatten(), Segments.from_lengths(wanted.sum(1).numpy()))
        out: Tensor = ours(x[real], Segments.from_lengths(real.sum(1).numpy()), kept=kept)
        return out

    return run


def target_where_predicted(step: PlainStep) -> Replacements:
    """The target's last block computes only the predicted tokens after its attention."""
    encoder = step.model.target
    last = _last_block(encoder.blocks[-1])

    @torch.no_grad()
    def wanted(batch: PlainBatch) -> Tensor:
        x = encoder.embed(batch.target, None)
        for block in encoder.blocks[:-1]:
            x = block(x, None)
        asked = torch.zeros(x.shape[:2], dtype=torch.bool)
        image = torch.arange(len(x))[:, None].expand_as(batch.predicted)
        asked[image[batch.asked], batch.predicted[batch.asked]] = True
        z = F.layer_norm(encoder.norm(last(x, torch.ones_like(asked), asked)), x.shape[2:], eps=NORM_EPS)
        return z.new_zeros(*batch.asked.shape, z.shape[1]).masked_scatter(batch.asked[:, :, None], z)

    yield step.model, "wanted", wanted


def one_target_for_two_sources(step: PlainStep) -> Replacements:
    """Encode a target once for its two sources."""
    model = step.model

    @torch.no_grad()
    def wanted(batch: PlainBatch) -> Tensor:
        target = model.target(batch.target[::2]).repeat_interleave(2, dim=0)
        return take(F.layer_norm(target, target.shape[2:], eps=NORM_EPS), batch.predicted)

    yield model, "wanted", wanted


def predictor_where_predicted(step: PlainStep) -> Replacements:
    """The predictor's last block computes only the mask tokens after its attention."""
    predictor = step.model.predictor
    last = _last_block(predictor.blocks[-1])

    def forward(z: Tensor, batch: PlainBatch) -> Tensor:
        x, real = predictor.tokens(z, batch), torch.cat([batch.seen, batch.asked], dim=1)
        for block in predictor.blocks[:-1]:
            x = block(x, real)
        out = predictor.proj(predictor.norm(last(x, real, torch.cat([batch.seen & False, batch.asked], dim=1))))
        return out.new_zeros(*batch.asked.shape, out.shape[1]).masked_scatter(batch.asked[:, :, None], out)

    yield predictor, "forward", forward


def residual_norm(step: PlainStep) -> Replacements:
    """One operator gives the residual stream and its LayerNorm, and adds their gradients."""
    for block in _blocks(step):

        def forward(x: Tensor, real: Tensor | None, block: Block = block) -> Tensor:
            found = kernels.residual_norm(x.flatten(0, 1), None, block.norm1.weight, block.norm1.bias, eps=NORM_EPS)
            stream, normed = (part.unflatten(0, x.shape[:2]) for part in found)
            return block.feed(stream + block.attend(normed, real))

        yield block, "forward", forward


def conditioned_mlp(step: PlainStep) -> Replacements:
    """LayerNorm, MLP and residual are one operator; so is the mask tokens' MLP with the action as a bias."""
    for block in _blocks(step):

        def feed(x: Tensor, block: Block = block) -> Tensor:
            weights = block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias
            norm = {"norm_weight": block.norm2.weight, "norm_bias": block.norm2.bias}
            out = kernels.conditioned_mlp(x.flatten(0, 1), *weights, **norm, residual=True, eps=NORM_EPS)
            return out.unflatten(0, x.shape[:2])

        yield block, "feed", feed
    mix, width = step.model.predictor.mix, step.model.predictor.mask_token.shape[0]

    def mixed(asked: Tensor) -> Tensor:
        first, second, last = mix[0], mix[2], mix[4]
        out = kernels.conditioned_mlp(
            asked[:, :, :width].flatten(0, 1), first.weight[:, :width], first.bias, second.weight, second.bias,
            action=asked[:, 0, width:], w_action=first.weight[:, width:],
            cu_seqlens=Segments.uniform(*asked.shape[:2]).cu_seqlens,
        )  # fmt: skip
        return last(F.gelu(out)).unflatten(0, asked.shape[:2])

    yield mix, "forward", mixed


def predictor_input(step: PlainStep) -> Replacements:
    """Write the predictor's tokens once, each to its place."""
    predictor = step.model.predictor

    def tokens(z: Tensor, batch: PlainBatch) -> Tensor:
        (images, seen), asked = batch.context.shape, batch.predicted.shape[1]
        masked = predictor.mask_token + predictor.pos_embed[0][batch.predicted]
        masked = predictor.mix(torch.cat([masked, batch.action[:, None].expand(-1, asked, -1)], dim=2))
        place = torch.arange(images * (seen + asked)).view(images, -1)
        return kernels.predictor_input(
            predictor.embed(z).flatten(0, 1), batch.context.flatten(), predictor.pos_embed[0],
            torch.cat([place[:, :seen].flatten(), place[:, seen:].flatten()]), rows=masked.flatten(0, 1),
        ).unflatten(0, place.shape)  # fmt: skip

    yield predictor, "tokens", tokens


def stopgrad_l2(step: PlainStep) -> Replacements:
    """The loss gathers the target's rows, normalises them and writes the gradient."""
    model = step.model

    def forward(batch: PlainBatch) -> Tensor:
        with torch.no_grad():
            target = model.target(batch.target)
        prediction = model.predictor(model.encoder(batch.source, batch.context, batch.seen), batch)[batch.asked]
        rows = torch.arange(len(target))[:, None] * target.shape[1] + batch.predicted
        return kernels.stopgrad_l2(
            prediction, target.flatten(0, 1), index=rows[batch.asked], normalize_target=True, eps=NORM_EPS
        )

    yield model, "forward", forward


def ema_update(step: PlainStep) -> Replacements:
    """Update the EMA of all weights in one call."""
    encoder, target = ([p.data for p in network.parameters()] for network in _encoders(step))
    yield step, "average", lambda: kernels.ema_update(target, encoder, 0.996)


class _Called(nn.Module):
    """A plain block with our block's arguments, its mask in place of segments."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._forward = block.forward

    def forward(self, x: Tensor, real: Tensor | None, _: None) -> Tensor:
        return self._forward(x, real)


def checkpointing(step: PlainStep) -> Replacements:
    """Recompute each block in the backward pass."""
    for block in _blocks(step):

        def forward(x: Tensor, real: Tensor | None, alone: nn.ModuleList) -> Tensor:
            return run_blocks(alone, x, real, recompute=True)

        yield block, "forward", partial(forward, alone=nn.ModuleList([_Called(block)]))


PARTS: dict[str, Callable[[PlainStep], Replacements]] = {
    part.__name__: part
    for part in (
        patchify, visible_patches, packed_lengths, target_where_predicted, one_target_for_two_sources,
        predictor_where_predicted, residual_norm, conditioned_mlp, predictor_input, stopgrad_l2, ema_update,
        checkpointing,
    )
}  # fmt: skip
