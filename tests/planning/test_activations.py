"""Kept activations against what autograd keeps, and the token counts they are worked out from."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kept_bytes import kept_bytes
from small_run import small_config

from iwm_fast.commands.plan import planner_of
from iwm_fast.planning.activations import activations
from iwm_fast.planning.tokens import Tokens

CASES = {
    "feature": {},
    "sequence": {"model__predictor__conditioning": "sequence"},
    "block": {"model__predictor__conditioning": "block"},
    "mlp": {"model__predictor__kind": "mlp", "model__predictor__conditioning": "block"},
    "checkpointing": {"train__activation_checkpointing": True},
    "wide": {"model__encoder": {"depth": 3, "width": 64, "heads": 4, "mlp_ratio": 2.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plain_operators_keep_what_the_formula_says(case, monkeypatch):
    """Half a percent is for what it leaves out: bounds of segments, actions of a few images.

    One length for all images: with several, the CPU's attention keeps its result by length and joined.
    """
    # An engine of stage 3, in a test before this one, leaves DeepSpeed's own linear layer in the place of torch's.
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)
    config = small_config(Path("unused"), **CASES[case])
    context = [7] * 16
    predicted = context if case == "mlp" else [5] * 16
    expected = activations(config, Tokens(np.array(context), np.array(predicted)), hidden_kept=True).kept
    assert kept_bytes(config, context, predicted) == pytest.approx(expected, rel=5e-3)


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
