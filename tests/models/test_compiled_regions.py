"""Compiled regions compute what the model computes, and neither lengths nor depth add compiled code."""

from __future__ import annotations

import copy
import io
from types import MethodType, SimpleNamespace

import pytest
import torch

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.models import IWM
from iwm_fast.models.compiled_regions import compilations, compile_regions

pytestmark = pytest.mark.usefixtures("regions_as_traced")

ACTIONS = 3


def configure(kind: str, *, depth: int = 2, target: str = "ema", **more: object) -> ModelConfig:
    """16 × 16 images of 4 × 4 patches, blocks of different widths in encoder and predictor."""
    return ModelConfig(
        encoder=EncoderShape(depth=depth, width=16, heads=2, mlp_ratio=2.0),
        patch=4,
        image=16,
        target=target,  # type: ignore[arg-type]
        predictor=PredictorConfig(
            kind=kind,  # type: ignore[arg-type]
            depth=depth,
            width=12,
            heads=3,
            mlp_ratio=1.5,
            conditioning="block" if kind == "mlp" else "feature+block",
        ),
        **more,  # type: ignore[arg-type]
    )


CASES = [
    pytest.param(configure("vit"), True, id="vit, checkpointed"),
    pytest.param(configure("mlp", target="shared"), False, id="mlp, shared target"),
]
# Of one to four images; the last three leave one token or none to the encoder, the predictor or both.
LENGTHS = [
    ([5, 1, 7, 6], [2, 4, 3, 2]), ([3, 9], [6, 1]), ([8, 4, 2], [3, 3, 3]), ([6], [5]),
    ([1], [1]), ([0, 4], [0, 1]), ([0, 0], [0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "recompute"), CASES)
def test_loss_and_every_gradient_of_any_lengths(plain: SimpleNamespace, config: ModelConfig, recompute: bool) -> None:
    """Against the independent float64 forward; 1e-5 as for the model without compile."""
    model = plain.exact_model(config, ACTIONS, activation_checkpointing=recompute)
    names = list(model.state_dict())
    compile_regions(model)
    assert list(model.state_dict()) == names
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for seed, (context, predicted) in enumerate(LENGTHS):
        batch = plain.draw_batch(config, ACTIONS, context, predicted, seed)
        model.zero_grad()
        loss = model(*batch.arguments()).loss
        expected = plain.iwm_loss(model, state, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        if not any(predicted if config.predictor.kind == "vit" else context):
            continue
        loss.backward()
        wanted = torch.autograd.grad(expected, list(state.values()), allow_unused=True)
        for (name, parameter), theirs in zip(model.named_parameters(), wanted, strict=True):
            if parameter.requires_grad and theirs is not None:
                tolerance = 1e-5 * float(theirs.abs().max())
                torch.testing.assert_close(
                    parameter.grad, theirs, rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_prefix_tokens_and_positions_of_any_lengths(plain: SimpleNamespace, positions: str) -> None:
    """Against the same model as it is; the compiled one rounds otherwise."""
    config = configure("vit", prefix_tokens=2, positions=positions)
    model, other = (plain.exact_model(config, ACTIONS) for _ in range(2))
    compile_regions(model)
    for seed, (context, predicted) in enumerate(LENGTHS):
        batch = plain.draw_batch(config, ACTIONS, context, predicted, seed)
        found, expected = (one(*batch.arguments()).loss for one in (model, other))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        if sum(predicted):
            trained = [[p for p in one.parameters() if p.requires_grad] for one in (model, other)]
            pairs = zip(
                torch.autograd.grad(found, trained[0], allow_unused=True, materialize_grads=True),
                torch.autograd.grad(expected, trained[1], allow_unused=True, materialize_grads=True),
                strict=True,
            )
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_copy_computes_with_its_own_weights() -> None:
    """As `torch.optim.swa_utils.AveragedModel` makes one. A single token runs without compilation."""
    model = IWM(configure("mlp"), ACTIONS)
    compile_regions(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        one = torch.randn(1, 12)
        assert copied.predictor.finish(one).abs().sum() == 0
        assert model.predictor.finish(one).abs().sum() > 0
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)  # not compiled
    assert torch.equal(read.predictor.finish(one), model.predictor.finish(one))
    for module, copy_of_it in zip(model.modules(), copied.modules(), strict=True):
        for name, region in vars(module).items():
            if isinstance(region, MethodType):
                assert vars(copy_of_it)[name].__self__ is copy_of_it


@pytest.mark.slow
def test_neither_lengths_nor_depth_add_to_the_compiled_code(plain: SimpleNamespace) -> None:
    counts = []
    for depth in (2, 5):
        config = configure("vit", depth=depth)
        torch.manual_seed(0)
        model = IWM(config, ACTIONS).double()
        compile_regions(model)
        before, since = compilations(), []
        for seed in range(12):
            lengths = torch.randint(2, 8, (2, 3), generator=torch.Generator().manual_seed(seed)).tolist()
            model(*plain.draw_batch(config, ACTIONS, *lengths, seed).arguments()).loss.backward()
            since.append(compilations() - before)
        counts.append(since)
    # Embedding: context, target. Before an attention: context, target, predictor. After it the same, and once for each
    # of the last two whose last block computes fewer tokens. The predictor's end.
    assert counts == [[2 + 3 + 5 + 1] * 12] * 2
