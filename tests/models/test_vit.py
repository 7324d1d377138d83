"""The encoder: visible patches only, with timm's parameter names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from iwm_fast.config.schema import EncoderArchitecture, EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.export.timm_names import from_timm, timm_arguments, timm_name, to_timm
from iwm_fast.models import Segments, VisionTransformer
from iwm_fast.models.positions import sincos_positions

CONFIG = ModelConfig(
    encoder=EncoderShape(depth=2, width=16, heads=2),
    patch=4,
    image=12,
    predictor=PredictorConfig(depth=1, width=8, heads=1),
)


@pytest.fixture
def encoder(plain: SimpleNamespace) -> VisionTransformer:
    return plain.exact_model(CONFIG, 3).encoder


def test_positions_one_patch_at_a_time(plain: SimpleNamespace) -> None:
    table = sincos_positions(16, 3)
    for patch in range(9):
        torch.testing.assert_close(table[patch], plain.position(16, patch % 3, patch // 3).float())
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(18, 3)


def test_all_patches_equal_an_independent_forward_of_the_exported_state(
    plain: SimpleNamespace, encoder: VisionTransformer
) -> None:
    """The exported tensors, read by timm's names, give the same values up to fp32 rounding of fixed positions."""
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    state = to_timm(encoder.state_dict(), 3)
    out = encoder(images).view(2, 9, -1)
    for i in range(2):
        torch.testing.assert_close(out[i], plain.vit(state, images[i], 2, list(range(9))), rtol=1e-5, atol=1e-5)


def test_exported_names_are_those_of_timm(encoder: VisionTransformer) -> None:
    """The names of timm's VisionTransformer of two blocks without class token, from its source."""
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{i}.{layer}" for i in range(2) for layer in block), "norm"]
    state = to_timm(encoder.state_dict(), 3)
    assert set(state) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {"pos_embed"}
    assert state["pos_embed"].shape == (1, 9, 16)
    assert state["patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    assert state["blocks.1.mlp.fc1.weight"].shape == (64, 16)
    assert timm_name("blocks.11.mlp.w_out") == "blocks.11.mlp.fc2.weight"
    encoder.load_state_dict(from_timm(state))
    assert timm_arguments(CONFIG.architecture)["embed_dim"] == 16


@pytest.mark.parametrize("counts", [[4, 4], [5, 2], [2, 5], [0, 3], [1, 0]], ids=str)
def test_visible_patches_one_image_at_a_time(
    plain: SimpleNamespace, encoder: VisionTransformer, counts: list[int]
) -> None:
    batch = plain.draw_batch(CONFIG, 3, counts, [1, 1])
    patches, segments = plain.pack(batch.context)
    out = encoder(batch.source, patches, segments)
    state = to_timm(encoder.state_dict(), 3)
    for got, image, visible in zip(out.split(counts), batch.source, batch.context, strict=True):
        torch.testing.assert_close(got, plain.vit(state, image, 2, visible), rtol=1e-5, atol=1e-5)


def test_hidden_pixels_do_not_matter(plain: SimpleNamespace, encoder: VisionTransformer) -> None:
    batch = plain.draw_batch(CONFIG, 3, [4, 6], [1, 1])
    patches, segments = plain.pack(batch.context)
    before = encoder(batch.source, patches, segments)
    changed = 255 - batch.source
    for i, visible in enumerate(batch.context):
        for p in visible:
            y, x = p // 3 * 4, p % 3 * 4
            changed[i, y : y + 4, x : x + 4] = batch.source[i, y : y + 4, x : x + 4]
    assert torch.equal(encoder(changed, patches, segments), before)


def test_initialised_alike_for_a_seed_and_residual_writes_scaled_by_their_layer() -> None:
    shape = EncoderShape(depth=3, width=64, heads=2)
    torch.manual_seed(3)
    first = VisionTransformer(EncoderArchitecture(shape, 16, 4))
    torch.manual_seed(3)
    again = VisionTransformer(EncoderArchitecture(shape, 16, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    first.requires_grad_(False)
    for layer, block in enumerate(first.blocks, start=1):
        for weight, depth in (
            (block.attn.qkv.weight, 0.5),
            (block.attn.proj.weight, layer),
            (block.mlp.w_in, 0.5),
            (block.mlp.w_out, layer),
        ):
            xavier = (2 / sum(weight.shape)) ** 0.5
            assert weight.std() == pytest.approx(xavier / (2 * depth) ** 0.5, rel=0.05)
    assert not any(p.any() for name, p in first.named_parameters() if name.endswith(("bias", "b_in", "b_out")))


def test_wrong_arguments_say_what_is_wrong(encoder: VisionTransformer) -> None:
    images = torch.zeros(2, 12, 12, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be uint8"):
        encoder(images.float())
    with pytest.raises(ValueError, match="12, 12, 3"):
        encoder(images[:, :8])
    with pytest.raises(ValueError, match="give both or neither"):
        encoder(images, torch.tensor([0]))
    with pytest.raises(ValueError, match="segments are of 1 images"):
        encoder(images, torch.tensor([0]), Segments.from_lengths([1]))
