"""Prefix tokens and positions of every kind: packed batches equal a plain dense encoder, image by image, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.config import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.models import IWM, Segments, VisionTransformer
from iwm_fast.models.blocks import Kept
from iwm_fast.models.decay import decayed_parameters
from iwm_fast.models.packing import pack
from iwm_fast.models.positions import rotation_table

SHAPE = EncoderShape(depth=2, width=24, heads=3)  # of 8: two angles a side
KINDS = [(prefix, positions) for prefix in (0, 1, 3) for positions in ("sincos", "learned", "rope")]
GRID = 3
TIGHT = {"rtol": 0.0, "atol": 1e-9}


def config(prefix: int, positions: str, **more: object) -> ModelConfig:
    """An eps that shows: it is no one's default."""
    given = {
        "encoder": SHAPE,
        "image": 12,
        "patch": 4,
        "norm_eps": 1e-3,
        "predictor": PredictorConfig(depth=1, width=8),
    }
    return ModelConfig(**(given | {"prefix_tokens": prefix, "positions": positions} | more))


_MADE: dict[tuple[int, str], IWM] = {}


def model(plain, prefix: int, positions: str) -> IWM:
    if (prefix, positions) not in _MADE:
        _MADE[prefix, positions] = plain.exact_model(config(prefix, positions), 3)
    return _MADE[prefix, positions]


def drawn(images: int, side: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)


def chosen(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(GRID * GRID, generator=generator)[:n].tolist() for n in lengths]


def expected(plain, encoder: VisionTransformer, images: Tensor, patches: list[list[int]]) -> Tensor:
    """The patches' tokens alone, packed."""
    prefix = encoder.architecture.prefix_tokens
    return torch.cat([plain.dense_encoder(encoder, i, p)[prefix:] for i, p in zip(images, patches, strict=True)])


@pytest.mark.parametrize(("prefix", "positions"), KINDS)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=6)
def test_a_packed_batch_equals_each_image_alone(plain, prefix, positions, lengths, seed):
    encoder, images, patches = model(plain, prefix, positions).encoder, drawn(len(lengths)), chosen(lengths, seed)
    with torch.no_grad():
        found = encoder(images, *plain.pack(patches))
        torch.testing.assert_close(found, expected(plain, encoder, images, patches), **TIGHT)


@pytest.mark.parametrize(("prefix", "positions"), KINDS)
def test_whole_images_and_their_kept_tokens(plain, prefix, positions):
    encoder, images = model(plain, prefix, positions).encoder, drawn(2)
    everything = [list(range(GRID * GRID))] * 2
    with torch.no_grad():
        alone = torch.stack([plain.dense_encoder(encoder, i, p) for i, p in zip(images, everything, strict=True)])
        torch.testing.assert_close(encoder.all_tokens(images), alone, **TIGHT)
        torch.testing.assert_close(encoder(images), alone[:, prefix:].flatten(0, 1), **TIGHT)
        rows = torch.tensor([16, 0, 9, 4])
        found = encoder(images, kept=Kept(rows, Segments.from_lengths([2, 2])))
        torch.testing.assert_close(found, alone[:, prefix:].flatten(0, 1)[rows], **TIGHT)


@pytest.mark.parametrize(("prefix", "positions"), KINDS)
def test_padding_changes_no_token_and_no_gradient(plain, prefix, positions):
    encoder, images, patches = model(plain, prefix, positions).encoder, drawn(3), chosen([4, 0, 2])
    flat, lengths = [patch for image in patches for patch in image], [4, 0, 2]

    def gradients(padding: list[int]) -> tuple[Tensor, list[Tensor]]:
        out = encoder(images, *pack(*map(torch.tensor, (flat, lengths)), padding=padding, ceiling=9))[: len(flat)]
        trained = list(encoder.parameters())
        return out.detach(), list(torch.autograd.grad((out**2).sum(), trained))

    (plainly, without), (padded, within) = gradients([]), gradients([3, 2])
    torch.testing.assert_close(padded, plainly, **TIGHT)
    for a, b in zip(within, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("prefix", "positions"), KINDS)
def test_gradients_equal_those_of_the_plain_encoder(plain, prefix, positions):
    encoder, images, patches = model(plain, prefix, positions).encoder, drawn(3), chosen([5, 0, 3])
    names = [name for name, _ in encoder.named_parameters()]
    weights = [value for _, value in encoder.named_parameters()]
    found = torch.autograd.grad((encoder(images, *plain.pack(patches)) ** 3).sum(), weights)
    wanted = torch.autograd.grad((expected(plain, encoder, images, patches) ** 3).sum(), weights)
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda said, name=name: f"{name}: {said}")


def test_what_is_cached_in_inference_can_be_trained_with():
    rotation_table.cache_clear()
    with torch.inference_mode():
        tables = rotation_table(4, 16, 100.0, torch.device("cpu"), torch.float32), Segments.uniform(3, 17)
        images = tables[1].image_of_token
    weight = torch.ones(16, 16, requires_grad=True)
    (weight * tables[0]).sum().backward()
    assert not any(tensor.is_inference() for tensor in (tables[0], tables[1].cu_seqlens, images))


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_the_loss_of_several_sources_with_prefix_tokens(plain, checkpointing, positions):
    """K = 2 sources of one target, against the same batch with each source's target given to it."""
    told = config(2, positions)
    ours = plain.exact_model(told, 3, activation_checkpointing=checkpointing)
    batch = plain.draw_batch(told, 3, [4, 3, 2, 5], [2, 3, 1, 2])
    source, target, *rest = batch.arguments()
    both = [ours(source, target[::2], *rest), ours(source, target[::2].repeat_interleave(2, 0), *rest)]
    grads = [torch.autograd.grad(out.loss, [p for p in ours.parameters() if p.requires_grad]) for out in both]
    torch.testing.assert_close(both[0].loss, both[1].loss)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_prefix_tokens_and_learned_positions_do_not_decay():
    decays = decayed_parameters(IWM(config(2, "learned"), 3))
    assert [decays[f"{part}.{name}"] for part in ("encoder", "target_encoder") for name in ("prefix", "pos_embed")] == (
        [False] * 4
    )


@pytest.mark.parametrize(("prefix", "positions"), KINDS)
def test_the_state_holds_what_is_learned(prefix, positions):
    encoder = VisionTransformer(config(prefix, positions).architecture)
    state = encoder.state_dict()
    assert ("prefix" in state, "pos_embed" in state) == (prefix > 0, positions == "learned")
    if prefix:
        assert state["prefix"].shape == (prefix, 24)
    if positions == "learned":
        assert state["pos_embed"].shape == (9, 24)


@pytest.mark.parametrize(("image", "patch"), [(28, 14), (15, 5), (9, 9)])
def test_any_patch_that_divides_the_image(plain, image, patch):
    encoder = plain.exact_model(config(1, "learned", image=image, patch=patch), 3).encoder
    images, grid = drawn(2, image), image // patch
    every = list(range(grid * grid))
    with torch.no_grad():
        wanted = torch.stack([plain.dense_encoder(encoder, i, every) for i in images])
        torch.testing.assert_close(encoder.all_tokens(images), wanted, **TIGHT)
