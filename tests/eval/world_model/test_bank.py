from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import pictures

from iwm_fast.actions.space import ActionSpace
from iwm_fast.actions.transforms import JITTER, colour_matrix
from iwm_fast.config import ActionsConfig
from iwm_fast.eval.world_model.bank import jittered_views, make_bank

SPACE = ActionSpace()


def test_views_are_the_affine_map_of_colour_rounded_and_clipped_once():
    image = pictures(1, side=13)[0]
    jitter = make_bank(ActionsConfig(strength=3.0), SPACE, 0, 37).jitter
    matrix = np.asarray(colour_matrix(jitter), np.float64)
    exact = np.einsum("nij,hwj->nhwi", matrix[:, :, :3], image.numpy()) + matrix[:, None, None, :, 3]
    views = jittered_views(image, jitter).numpy().astype(float)
    assert np.abs(views - exact.clip(0, 255)).max() < 0.501  # half a level, and fp32 of a level of 255
    assert views.min() == 0
    assert views.max() == 255


def test_views_equal_those_of_dali():
    """Training's targets come from DALI's color_twist; the bank's must be the same pictures."""
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    image = pictures(1, side=24)[0]
    jitter = make_bank(ActionsConfig(), SPACE, 5, 16).jitter
    fn = dali.fn

    @dali.pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def twist():
        names = {n: fn.external_source(source=[list(getattr(jitter, n))], cycle=True) for n in JITTER}
        picture = fn.external_source(source=[[image.numpy()] * 16], cycle=True, layout="HWC")
        return fn.color_twist(picture, **names)

    pipeline = twist()
    pipeline.build()
    want = np.stack([np.asarray(view) for view in pipeline.run()[0]]).astype(int)
    difference = np.abs(jittered_views(image, jitter).numpy().astype(int) - want)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3  # levels: exact values on a half round either way


def test_bank_depends_on_seed_and_sample_only_and_is_distinct():
    one = make_bank(ActionsConfig(), SPACE, 3, 64)
    assert np.array_equal(one.actions, make_bank(ActionsConfig(), SPACE, 3, 64).actions)
    assert not np.array_equal(one.actions, make_bank(ActionsConfig(), SPACE, 4, 64).actions)
    assert not np.array_equal(one.actions, make_bank(ActionsConfig(), SPACE, 3, 64, seed=1).actions)
    assert len(np.unique(one.actions, axis=0)) == 64


@pytest.mark.parametrize("vary", JITTER)
def test_a_bank_of_one_component_leaves_the_others_neutral(vary):
    bank = make_bank(ActionsConfig(), SPACE, 0, 32, vary=vary)
    decoded = SPACE.decode(bank.actions)
    for name in JITTER:
        assert (len(np.unique(decoded[name])) == 32) == (name == vary)
        assert name == vary or not decoded[name].any()


def test_a_component_that_is_no_jitter_is_refused():
    with pytest.raises(ValueError, match="vary is 'flip'"):
        make_bank(ActionsConfig(), SPACE, 0, 8, vary="flip")


def test_neutral_jitter_gives_the_image_back():
    image = pictures(1)[0]
    bank = make_bank(ActionsConfig(), SPACE, 0, 2)
    assert torch.equal(jittered_views(image, type(bank.jitter).neutral(3)), image.expand(3, -1, -1, -1))
