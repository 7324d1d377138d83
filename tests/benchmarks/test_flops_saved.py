"""FLOPs that the step saves, against a step that computes everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import small_config

from iwm_fast.actions.external import action_dim
from iwm_fast.benchmarks.baselines.plain_step import PlainBatch, PlainIWM, PlainShape
from iwm_fast.benchmarks.flops_saved import count_savings
from iwm_fast.measure.flop_count import counted_flops

IMAGES = 128


def _config(**changes):
    """One target block of 2 × 2 in a grid of 4 × 4, the rest visible: every image has the same number of tokens."""
    masks = {"masks__target_blocks": 1, "masks__target_scale": [0.25, 0.25], "masks__target_aspect": [1.0, 1.0]}
    return small_config(Path("unused"), **{**masks, "masks__context_scale": [1.0, 1.0], **changes})


def test_without_any_saving_it_is_the_plain_step():
    """The plain step embeds all patches, runs both last blocks whole, and mixes the action into every mask token."""
    config = _config()
    found = count_savings(config, IMAGES)
    shape, width, actions = config.model.encoder_shape, config.model.predictor.width, action_dim(config.actions)
    with torch.device("meta"):
        model = PlainIWM(PlainShape(32, 8, shape.depth, shape.width, shape.heads, 2, width, actions))
        pictures, rows = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.int64)
        seen = torch.ones(1, 16, dtype=torch.bool)
        batch = PlainBatch(
            pictures, pictures, torch.zeros(1, actions), rows[:, :12], seen[:, :12], rows[:, :4], seen[:, :4]
        )
    plain = counted_flops(lambda: model(batch).backward())
    taken_back = sum(operations - found["shipped"] for operations in found["without"].values())
    # The plain mixer has the action in every token, not per image, and computes that input's gradient too.
    mixer = 3 * 2 * 4 * actions * width - 2 * 2 * actions * width
    assert found["shipped"] + taken_back + mixer == plain


def test_equal_images_need_no_padding_and_one_block_no_second_question():
    found = count_savings(_config(), IMAGES)
    assert found["without"]["padded to the longest of 128 images"] == found["shipped"]
    assert found["without"]["the predictor asked once a target block"] == found["shipped"]


def test_sources_share_the_target():
    """K sources per image: one whole target, and everything else K times."""
    found = count_savings(_config(), IMAGES)
    whole = found["without"]["the target's last block whole"] - found["shipped"]
    rest = found["context"] + found["predictor"]
    for sources in (2, 4):
        assert found["sources_per_target"][str(sources)] == rest + (found["target_forward"] + whole) / sources


def test_a_configuration_with_several_sources_is_counted_with_them():
    alone, shared = count_savings(_config(), IMAGES), count_savings(_config(views__sources_per_target=2), IMAGES)
    assert shared["shipped"] == 2 * alone["sources_per_target"]["2"]
    assert shared["without"]["the target's last block whole"] == shared["shipped"]  # several sources need it whole


def test_the_mlp_predictor_is_refused():
    config = _config(model__predictor__kind="mlp", model__predictor__conditioning="block")
    with pytest.raises(ValueError, match="counted for vit"):
        count_savings(config, IMAGES)
