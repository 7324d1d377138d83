"""The plan's saved activations against autograd's, and the token counts they are computed from."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import small_config

from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks.counting.kept_count import KeptCounter, counted_activations
from iwm_fast.cli.plan import planner_of
from iwm_fast.config import Config
from iwm_fast.cost.activations import KeptBytes, activations
from iwm_fast.cost.flops import window_tokens
from iwm_fast.cost.tokens import Tokens

pytestmark = pytest.mark.usefixtures("torchs_own_linear")

PUSHED = {"groups": ["external"], "external": {"kind": "discrete", "names": ["a", "b"]}}
CASES = {
    "feature": {},
    "history": {"actions": PUSHED, "model__history": 3},
    "steps ahead": {"actions": PUSHED, "model__history": 2, "train__horizon": 3},
    "sequence": {"model__predictor__conditioning": "sequence"},
    "block": {"model__predictor__conditioning": "block"},
    "mlp": {"model__predictor__kind": "mlp", "model__predictor__conditioning": "block"},
    "checkpointing": {"train__activation_checkpointing": True},
    "several sources": {"views": {"sources_per_target": 2}},
    "sigreg": {"model__regularizer__kind": "sigreg"},
    "vicreg": {"model__regularizer__kind": "vicreg"},
    "frozen target": {
        "model__target": "frozen",
        "model__target_init": "w",
        "model__target_encoder": {"encoder": {"depth": 1, "width": 96, "heads": 3, "mlp_ratio": 2.0}},
    },
    "frozen encoder": {"model__freeze_encoder": True, "model__init": "w", "model__target": "shared"},
    "prefix tokens": {"model__prefix_tokens": 5},
    "prefix tokens and rope": {"model__prefix_tokens": 5, "model__positions": "rope"},
    "rope": {"model__positions": "rope"},
    "rope and checkpointing": {
        "model__prefix_tokens": 5,
        "model__positions": "rope",
        "train__activation_checkpointing": True,
    },
    "prefix tokens and learned positions": {"model__prefix_tokens": 1, "model__positions": "learned"},
    "wide": {"model__encoder": {"depth": 3, "width": 64, "heads": 4, "mlp_ratio": 2.0}},
}


def assert_parts_agree(counted: KeptBytes, expected: KeptBytes, **beside: int) -> None:
    """Equal to the byte, except for what some parts may save `beside`."""
    for part, size in asdict(expected).items():
        assert size <= getattr(counted, part) <= size + beside.get(part, 0), part
    assert counted.total == pytest.approx(expected.total, rel=5e-3)


def rounded_sums(config: Config, tokens: Tokens) -> tuple[int, int]:
    """Return bytes of log-sum-exps beyond the tokens: attention allocates multiples of 32, for the longest image."""

    def beyond(lengths: np.ndarray, heads: int, depth: int) -> int:
        return depth * heads * 4 * (len(lengths) * -(-int(lengths.max()) // 32) * 32 - int(lengths.sum()))

    encoder, predictor = config.model.encoder_shape, config.model.predictor
    seen = np.repeat(tokens.context, tokens.history) + config.model.prefix_tokens
    in_predictor = 0
    for step in range(0 if predictor.kind == "mlp" else tokens.horizon):
        joined = window_tokens(config.model, tokens.context, step) + tokens.predicted
        joined = joined + (ActionSpace().dim if "sequence" in predictor.conditioning else 0)
        in_predictor += beyond(joined, predictor.head_count, predictor.depth)
    in_encoder = 0 if config.model.freeze_encoder else beyond(seen, encoder.heads, encoder.depth)
    return in_encoder, in_predictor


def few_of(config: Config) -> dict[str, int]:
    """Bytes that a regulariser saves beside what the formula names: means of features, knots, indices."""
    return {"loss": 16 * config.model.encoder_shape.width + 4096} if config.model.regularizer.kind != "none" else {}


@pytest.mark.parametrize("case", CASES)
def test_each_part_of_the_plain_operators_saves_what_the_formula_says(case):
    """One length for all images: with several, the CPU's attention saves its result by length and concatenated."""
    config = small_config(Path("unused"), **CASES[case])
    predicted = np.array([16 if config.train.horizon > 1 else 7 if case == "mlp" else 5] * 16)
    steps = config.model.history, config.train.horizon
    tokens = Tokens(np.array([7] * 16), predicted, config.views.sources_per_target, *steps)
    expected = activations(config, tokens, hidden_kept=True).parts
    # Actions, and the image of each token that is conditioned on one.
    few = 16 * (tokens.seen + int(tokens.predicted.sum()))
    assert_parts_agree(
        counted_activations(config, tokens), expected, predictor_input=few, predictor_blocks=few, **few_of(config)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_each_part_of_the_kernels_saves_what_the_formula_says(case, precision):
    """ViT-B's widths and masks as in training, on the meta device."""
    shape = {
        "model__image": 224, "model__patch": 16, "model__encoder": {"depth": 2, "width": 768, "heads": 12},
        "model__predictor": {"depth": 2, "width": 384, "heads": 12, "conditioning": "feature"}, "zero__stage": 1,
    }  # fmt: skip
    config = small_config(Path("unused"), **(shape | CASES[case]), train__precision=precision)
    tokens = planner_of(config, 32).tokens
    in_encoder, in_predictor = rounded_sums(config, tokens)
    beside = {"encoder_blocks": in_encoder, "predictor_input": 0, "predictor_blocks": in_predictor}
    beside = {part: size + 4096 for part, size in beside.items()}  # actions, and bounds of images
    assert_parts_agree(
        counted_activations(config, tokens, "meta"), activations(config, tokens).parts, **beside, **few_of(config)
    )


def test_the_hidden_of_no_mlp_is_saved():
    """Doubling the hidden changes no part with the kernels, and does with the plain operators."""
    changes = [{}, {"model__encoder__mlp_ratio": 8.0, "model__predictor__mlp_ratio": 8.0}]
    configs = [small_config(Path("unused"), **one) for one in changes]
    tokens = planner_of(configs[0], 8).tokens
    narrow, wide = (counted_activations(config, tokens, "meta") for config in configs)
    assert narrow == wide
    plain = [counted_activations(config, tokens) for config in configs]
    assert plain[1].encoder_blocks > 1.3 * plain[0].encoder_blocks
    assert plain[1].predictor_blocks > 1.3 * plain[0].predictor_blocks


def test_views_of_one_storage_count_once_and_weights_not_at_all():
    layer = torch.nn.Linear(3, 5)
    x = torch.ones(7, 6, requires_grad=True)
    counter = KeptCounter(layer)
    with counter.counting():
        layer(x[:, :3]).sum() + layer(x[:, 3:]).sum() + (x * x).sum()
    assert counter.bytes == {"": 7 * 6 * 4}


def test_memory_is_linear_in_the_images_and_bf16_halves_its_numbers():
    config = small_config(Path("unused"))
    tokens = planner_of(config, 32).tokens
    one, two = (activations(config, tokens.tiled(n)).kept for n in (32, 64))
    assert two == 2 * one
    half = activations(small_config(Path("unused"), train__precision="bf16"), tokens).kept
    assert one / 2 < half < 0.6 * one


def test_tokens_are_the_training_s_own():
    config = small_config(Path("unused"))
    tokens = planner_of(config, 64).tokens
    assert ((tokens.context >= 2) & (tokens.context + tokens.predicted <= 16)).all()
    assert (planner_of(config, 64).tokens.context == tokens.context).all()
    mlp = planner_of(small_config(Path("unused"), **CASES["mlp"]), 8).tokens
    assert (mlp.context == mlp.predicted).all()
