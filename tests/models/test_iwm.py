"""The whole model against an independent float64 forward, image by image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import nine_patches

from iwm_fast.config.schema import ModelConfig
from iwm_fast.models import IWM, Segments
from iwm_fast.models.packing import pack

ACTIONS = 3
CONDITIONINGS = ["none", "sequence", "feature", "block", "sequence+block", "feature+block"]


VARIANTS = {
    **{conditioning: nine_patches(conditioning) for conditioning in CONDITIONINGS},
    "shared target": nine_patches(target="shared"),
    "target as it is": nine_patches(normalize_target=False),
    "mlp": nine_patches("block", kind="mlp"),
    "mlp without action": nine_patches("none", kind="mlp", target="shared"),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_every_gradient(plain: SimpleNamespace, config: ModelConfig, recompute: bool) -> None:
    """1e-5: the model's fixed positions and pixel statistics are fp32, the independent ones float64."""
    model = plain.exact_model(config, ACTIONS, activation_checkpointing=recompute)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 0, 6], [2, 4, 3, 2])
    out = model(*batch.arguments())
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = plain.iwm_loss(model, state, batch)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    assert out.tokens == sum(len(image) for image in batch.predicted)
    out.loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target_encoder."):
            assert not parameter.requires_grad
            assert parameter.grad is None
            continue
        theirs = state[name].grad
        assert parameter.grad is not None, name
        assert theirs is not None, name
        torch.testing.assert_close(
            parameter.grad, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def exact_models(plain: SimpleNamespace) -> dict[str, IWM]:
    """Built once: the forward pass should dominate an example's time."""
    return {conditioning: plain.exact_model(nine_patches(conditioning), ACTIONS) for conditioning in CONDITIONINGS}


@given(data=st.data(), images=st.integers(1, 4), conditioning=st.sampled_from(CONDITIONINGS))
@settings(deadline=None, max_examples=12)
def test_any_lengths(
    plain: SimpleNamespace, exact_models: dict[str, IWM], data: st.DataObject, images: int, conditioning: str
) -> None:
    """Images with no context, a single token, nothing to predict, or nothing at all."""
    counts = st.lists(st.integers(0, 4), min_size=images, max_size=images)
    model = exact_models[conditioning]
    model.zero_grad()
    batch = plain.draw_batch(model.config, ACTIONS, data.draw(counts), data.draw(counts))
    state = dict(model.named_parameters())
    with torch.no_grad():
        expected = plain.iwm_loss(model, state, batch)
    out = model(*batch.arguments())
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-6, atol=1e-9)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_images_of_a_batch_do_not_see_each_other(plain: SimpleNamespace) -> None:
    """The sum over images, in any order and any split, is the same loss."""
    config = nine_patches("sequence+block")
    model = plain.exact_model(config, ACTIONS)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 3, 6], [2, 4, 3, 1])
    with torch.no_grad():
        whole = model(*batch.arguments()).loss
        shuffled = model(*batch.take([2, 0, 3, 1]).arguments()).loss
        parts = sum(model(*batch.take([i]).arguments()).loss for i in range(4))
    torch.testing.assert_close(shuffled, whole)
    torch.testing.assert_close(parts, whole)


def test_predictions_follow_their_images(plain: SimpleNamespace) -> None:
    config = nine_patches("feature+block")
    model = plain.exact_model(config, ACTIONS)
    z, action = torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(3, ACTIONS, dtype=torch.float64)
    order = [2, 0, 1]
    torch.testing.assert_close(model.predict(z[order], action[order]), model.predict(z, action)[order])


@pytest.mark.parametrize("kind", ["vit", "mlp"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_predictors_that_depend_on_the_action(plain: SimpleNamespace, kind: str, conditioning: str) -> None:
    if kind == "mlp" and conditioning not in ("none", "block"):
        pytest.skip("the mlp predictor has its action in its blocks or not at all")
    model = plain.exact_model(nine_patches(conditioning, kind=kind), ACTIONS)
    z = torch.randn(1, 9, 16, dtype=torch.float64).expand(2, -1, -1)
    action = torch.tensor([[0.0, 0.0, 0.0], [0.5, -0.5, 1.0]], dtype=torch.float64)
    one, other = model.predict(z, action)
    # Rows of one matmul may be summed in another order: equal up to float64's rounding, not to the bit.
    assert torch.allclose(one, other, rtol=1e-10, atol=1e-12) == (conditioning == "none")


def test_block_conditioning_begins_at_zero() -> None:
    torch.manual_seed(0)
    model = IWM(nine_patches("block"), ACTIONS)
    z, action = torch.randn(1, 9, 16).expand(2, -1, -1), torch.tensor([[0.0] * 3, [1.0] * 3])
    one, other = model.predict(z, action)
    assert torch.equal(one, other)
    before = [block.mlp.w_action for block in model.predictor.blocks]
    model.predict(z, action)[1].sum().backward()
    assert all(w is not None and w.grad is not None and w.grad.any() for w in before)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_predict_is_the_predictor_queried_at_every_patch(plain: SimpleNamespace, conditioning: str) -> None:
    config = nine_patches(conditioning)
    model = plain.exact_model(config, ACTIONS)
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    action = torch.randn(2, ACTIONS, dtype=torch.float64)
    z = model.encode(images)
    world = plain.as_timm(dict(model.named_parameters()), "predictor.")
    everywhere = list(range(9))
    for i in range(2):
        expected = plain.predictor(world, z[i], everywhere, everywhere, action[i], 3, 3)
        torch.testing.assert_close(model.predict(z, action)[i], expected, rtol=1e-5, atol=1e-5)


def test_target_encoder_begins_equal_and_is_the_encoder_where_shared() -> None:
    model = IWM(nine_patches(target="ema"), ACTIONS)
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    assert model.target_encoder is not None
    assert model.target_encoder is not model.encoder
    assert torch.equal(model.encode(images, "target"), model.encode(images, "context"))
    assert not model.encode(images, "target").requires_grad
    assert model.encode(images, "context").requires_grad
    shared = IWM(nine_patches(target="shared"), ACTIONS)
    assert shared.target_encoder is None
    assert not shared.encode(images, "target").requires_grad


def test_targets_are_normalised_as_the_loss_has_them() -> None:
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    z = IWM(nine_patches(), ACTIONS).targets(images)
    assert z.shape == (2, 9, 16)
    torch.testing.assert_close(z.mean(-1), torch.zeros(2, 9), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(2, 9), atol=1e-4, rtol=0)


def test_bf16_weights_give_an_fp32_loss_near_the_fp32_one(plain: SimpleNamespace) -> None:
    """bf16 has 8 bits of mantissa; over some thirty roundings in sequence the loss may differ by 3 %."""
    config = nine_patches("feature+block")
    model = plain.exact_model(config, ACTIONS)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 3, 6], [2, 4, 3, 1])
    expected = model(*batch.arguments()).loss
    batch.action = batch.action.float()
    out = model.bfloat16()(*batch.arguments())
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected, rtol=0.03, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.encoder.parameters())


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_does_not_round_its_constants(cast: torch.dtype) -> None:
    """Half of their bits would move every pixel by up to 2⁻⁸ of its value, and positions there and back again."""
    model = IWM(nine_patches(), ACTIONS)
    exact = {name: constant.clone() for name, constant in model.named_buffers()}
    assert exact.keys() >= {"encoder.patch_embed.scale", "encoder.pos_embed", "predictor.pos_embed"}
    for moved in (model.to(cast), model.float()):
        for name, constant in moved.named_buffers():
            assert torch.equal(constant.float(), exact[name]), name


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
@pytest.mark.parametrize("prefix_tokens", [0, 2])
def test_no_image_gives_no_tokens(positions: str, prefix_tokens: int) -> None:
    model = IWM(nine_patches(positions=positions, prefix_tokens=prefix_tokens), ACTIONS)
    images = torch.zeros(0, 12, 12, 3, dtype=torch.uint8)
    for z in (model.encode(images), model.targets(images)):
        assert z.shape == (0, 9, 16)
    assert model.encoder.all_tokens(images).shape == (0, prefix_tokens + 9, 16)
    assert model.predict(model.encode(images), torch.zeros(0, ACTIONS)).shape == (0, 9, 16)


def test_features_for_rank_are_predicted_tokens_of_every_place_of_the_grid() -> None:
    """400 images of 9 patches, all predicted: at most 2048 rows, with every grid position."""
    torch.manual_seed(0)
    model = IWM(nine_patches(), ACTIONS)
    images = torch.zeros(400, 12, 12, 3, dtype=torch.uint8)
    alone, every = Segments.uniform(400, 1), Segments.uniform(400, 9)
    patch, patches = torch.zeros(400, dtype=torch.int64), torch.arange(9).repeat(400)
    out = model(images, images, torch.zeros(400, ACTIONS), patch, alone, patches, every)
    assert not out.target_features.requires_grad
    assert 1000 <= len(out.target_features) <= 2048
    # All images are alike, so only positions differ, and rounding, which depends on the place in the batch: a row is
    # new if every earlier one is farther than that. (Rounded to digits, two equal rows may differ.)
    rows = out.target_features.double()
    near = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") < 1e-3
    new = ~near.tril(-1).any(dim=1)
    assert int(new.sum()) == 9


@pytest.mark.parametrize("precision", ["train", "fp8"])
def test_each_gathering_module_owns_what_it_hands_to_a_kernel(precision: str) -> None:
    """ZeRO stage 3 gathers the direct parameters of the module whose forward runs, and no others: the model must work
    with every other parameter emptied between a module's forward passes."""
    config = nine_patches("feature+block", target_precision=precision)
    model = IWM(config, ACTIONS).requires_grad_(False)
    values = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: torch.nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = values[parameter]

    def release(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    patches, segments = torch.tensor([0, 4, 7]), Segments.from_lengths([1, 2])
    arguments = (images, images, torch.ones(2, ACTIONS), patches, segments, patches, segments)
    expected = model(*arguments).loss
    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    torch.testing.assert_close(model(*arguments).loss, expected)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_several_sources_of_a_target_are_as_many_pairs(plain: SimpleNamespace, config: ModelConfig) -> None:
    """Four images whose second pair of targets is the first's: as two targets, loss and gradients stay the same."""
    model = plain.exact_model(config, ACTIONS)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 0, 6], [2, 4, 3, 2])
    source, target, *rest = batch.arguments()
    pairs = target[[0, 0, 2, 2]]
    apart = model(source, pairs, *rest)
    expected = torch.autograd.grad(apart.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    together = model(source, pairs[[0, 2]], *rest)
    found = torch.autograd.grad(together.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    torch.testing.assert_close(together.loss, apart.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(together.target_features, apart.target_features, rtol=1e-10, atol=1e-12)
    assert together.tokens == apart.tokens
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def padded(batch: Any, seen: list[int], asked: list[int], *, same: bool) -> tuple[Any, ...]:
    """Return the batch's arguments with padding segments; same: the mlp predictor predicts at its own context."""
    rows = [
        pack(np.concatenate([np.asarray(p, np.int64) for p in sets]), np.array([len(p) for p in sets]), "cpu", more, 9)
        for sets, more in ((batch.context, seen), (batch.predicted, asked))
    ]
    return batch.source, batch.target, batch.action, *rows[0], *rows[0 if same else 1]


@pytest.mark.parametrize("sources", [1, 2], ids=["", "two sources"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_padding_has_no_loss_and_no_gradient(plain: SimpleNamespace, config: ModelConfig, sources: int) -> None:
    """Float64, up to rounding: sums have additional zero terms, and so another order."""
    model = plain.exact_model(config, ACTIONS)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 3, 6], [2, 4, 3, 2])
    batch.target = batch.target[::sources]
    wanted = [p for p in model.parameters() if p.requires_grad]
    alone = model(*batch.arguments())
    expected = torch.autograd.grad(alone.loss, wanted, allow_unused=True)
    for seen, asked in (([1, 1], [9, 8]), ([7], [1])):
        found = model(*padded(batch, seen, asked, same=config.predictor.kind == "mlp"))
        torch.testing.assert_close(found.loss, alone.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.target_features, alone.target_features, rtol=1e-10, atol=1e-12)
        assert found.tokens == alone.tokens
        gradients = torch.autograd.grad(found.loss, wanted, allow_unused=True)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("conditioning", ["feature", "sequence+block"])
def test_padding_in_fp32_moves_the_loss_by_rounding_alone(plain: SimpleNamespace, conditioning: str) -> None:
    model = plain.exact_model(nine_patches(conditioning), ACTIONS).float()
    batch = plain.draw_batch(model.config, ACTIONS, [5, 1, 3, 6], [2, 4, 3, 2])
    batch.action = batch.action.float()
    with torch.no_grad():
        expected = model(*batch.arguments()).loss
        found = model(*padded(batch, [9, 9, 8], [9, 9, 9], same=False)).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_wrong_arguments_say_what_is_wrong(plain: SimpleNamespace) -> None:
    config = nine_patches()
    model = plain.exact_model(config, ACTIONS)
    batch = plain.draw_batch(config, ACTIONS, [2, 2], [2, 2])
    source, target, action, context, contexts, predicted, asked = batch.arguments()
    with pytest.raises(ValueError, match="target is"):
        model(source, target[[0, 1, 0]], action, context, contexts, predicted, asked)
    with pytest.raises(ValueError, match="action is"):
        model(source, target, action[:, :2], context, contexts, predicted, asked)
    with pytest.raises(ValueError, match="predicted_segments are of 2 images"):
        model(source, target, action, context, contexts, predicted[:3], asked)
    with pytest.raises(ValueError, match="which is"):
        model.encode(source, "teacher")
    with pytest.raises(ValueError, match="z is"):
        model.predict(torch.zeros(2, 8, 16).double(), action)
    with pytest.raises(ValueError, match="at least 1"):
        IWM(config, 0)
    more, mores = pack(np.array([0, 1, 2, 3]), np.array([2, 2]), "cpu", [1])
    with pytest.raises(ValueError, match="1 segments of padding and context_segments 0"):
        model(source, target, action, context, contexts, more, mores)
    mlp = plain.exact_model(nine_patches("block", kind="mlp"), ACTIONS)
    with pytest.raises(ValueError, match="maps each patch by itself"):
        mlp(source, target, action, context, contexts, predicted[:3], Segments.from_lengths([1, 2]))
