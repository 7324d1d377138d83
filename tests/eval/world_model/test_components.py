from __future__ import annotations

import numpy as np
import pytest
import reference_views
import torch
from made_images import picture
from worlds import Oracle, pictures, tiny_config, tiny_model

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig, Config
from iwm_fast.errors import UserError
from iwm_fast.eval.stats import chance_mrr
from iwm_fast.eval.world_model.components import DESTRUCTIVE, component_bank, components
from iwm_fast.eval.world_model.mrr import mean_reciprocal_rank

ALL = ActionsConfig(groups=("photometric", "geometric", "compression"), crop_scale=(0.3, 1.0))
SPACE = ActionSpace(ALL.groups)
IMAGE = torch.from_numpy(picture(24, 24))


def bank(vary, count=16):
    return component_bank(ALL, SPACE, IMAGE, 3, count, vary=vary)


def test_components_are_those_that_the_run_trains_with():
    jitter = ["brightness", "contrast", "saturation", "hue"]
    assert components(ALL) == [*jitter, "grayscale", "blur", "solarize", "compression", "flip", "rotation", "crop"]
    only = ActionsConfig(hue=0.0, blur_probability=0.0, grayscale_probability=0.0)
    assert components(only) == ["brightness", "contrast", "saturation", "solarize"]
    assert components(ActionsConfig(strength=0.0)) == []


@pytest.mark.parametrize("what", DESTRUCTIVE)
def test_a_corrupted_source_is_what_training_would_have_made_of_it(what):
    made = bank(what)
    told = SPACE.decode(made.actions)
    assert told[what].all()
    assert not any(told[other].any() for other in DESTRUCTIVE if other != what)
    image = IMAGE.numpy()
    want = {
        "grayscale": lambda: reference_views.grayscale(image),
        "blur": lambda: reference_views.blur(image, float(told["blur_sigma"][0])),
        "solarize": lambda: reference_views.solarize(image, ALL.solarize_threshold),
        "compression": lambda: reference_views.compress(image, told["compression_quality"][0]),
    }[what]()
    assert reference_views.error(made.source.numpy(), want) < 1
    assert reference_views.error(made.source.numpy(), image) > 3
    plain = bank(None)
    assert torch.equal(made.targets(IMAGE), plain.targets(IMAGE))
    for name in ("brightness", "contrast", "saturation", "hue"):
        np.testing.assert_allclose(told[name], SPACE.decode(plain.actions)[name], atol=1e-6)


def test_turned_views_are_encoded_as_in_training():
    """Relative to a target turned by k, the image is a source turned by -k, which k quarter turns undo."""
    made = bank("rotation")
    told = SPACE.decode(made.actions)
    views = made.targets(IMAGE).numpy()
    assert len(views) == 4
    for turns in range(4):
        np.testing.assert_array_equal(views[turns], np.rot90(IMAGE.numpy(), turns))
        assert [bool(told[f"rotation_{k}"][turns]) for k in (1, 2, 3)] == [turns == k for k in (1, 2, 3)]


def test_the_mirrored_view_has_its_flag():
    made = bank("flip")
    views = made.targets(IMAGE).numpy()
    np.testing.assert_array_equal(views[0], IMAGE.numpy())
    np.testing.assert_array_equal(views[1], IMAGE.numpy()[:, ::-1])
    assert SPACE.decode(made.actions)["flip"].tolist() == [False, True]


def test_crops_are_distinct_and_lead_to_the_part_that_they_tell():
    made = bank("crop", 32)
    assert len(np.unique(made.actions, axis=0)) == 32
    told = SPACE.decode(made.actions)
    assert not told["flip"].any()
    for view, x, y, w, h in zip(
        made.targets(IMAGE).numpy(), *(told[f"crop_{k}"] for k in ("x", "y", "w", "h")), strict=True
    ):
        width, height = 24 / np.exp(w), 24 / np.exp(h)
        left, top = 12 - x * width - width / 2, 12 - y * height - height / 2
        box = [round(v) for v in (left, top, width, height)]
        part = IMAGE.numpy()[box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
        assert reference_views.error(view, reference_views.resize(part, 24)) < 1


def test_a_bank_that_is_larger_than_the_crops_there_are_is_refused():
    few = ALL.model_copy(update={"crop_scale": (0.99, 1.0)})
    with pytest.raises(UserError, match="distinct crops"):
        component_bank(few, SPACE, IMAGE, 0, 64, vary="crop")


def test_an_unknown_component_is_refused_by_name():
    with pytest.raises(ValueError, match="vary is 'sharpness'"):
        bank("sharpness")
    with pytest.raises(ValueError, match="vary is 'flip'"):
        component_bank(ActionsConfig(), ActionSpace(), IMAGE, 0, 4, vary="flip")


@pytest.mark.parametrize(("vary", "size"), [("flip", 2), ("rotation", 4), ("blur", 16), ("crop", 16), ("hue", 16)])
def test_each_bank_has_its_own_chance(vary, size):
    config = tiny_config(image=16)
    config = Config(**(dict(config) | {"actions": ALL}))
    model, space = tiny_model(config)
    found = mean_reciprocal_rank(model, config, space, pictures(2, side=16), bank=16, vary=vary).summary()
    assert found["mrr_bank"] == found["mrr_queries"] == size
    assert found["mrr_chance"] == chance_mrr(size)
    assert found["mrr_neutral"] == pytest.approx(chance_mrr(size), rel=0.05)  # unless two views are the same


def test_targets_of_an_untrained_encoder_do_not_match_a_trained_predictor():
    """The oracle knows its own targets; among another encoder's it is no better than its pixels."""

    class Strange(Oracle):
        def encode(self, images, which="context"):  # noqa: ARG002  (the model's signature)
            generator = torch.Generator().manual_seed(1)
            mixed = torch.randn(64 * 3, 64 * 3, generator=generator)
            return (images.flatten(1).float() @ mixed).unflatten(1, (64, 3))

    config = Config(**(dict(tiny_config(normalize_target=False)) | {"actions": ActionsConfig(strength=0.5)}))
    space = ActionSpace()
    oracle, strange = Oracle(space), Strange(space)
    found = mean_reciprocal_rank(oracle, config, space, pictures(3), bank=32, untrained=strange).summary()
    assert found["mrr"] > 0.95
    assert found["mrr_untrained_target"] < 0.3
    same = mean_reciprocal_rank(oracle, config, space, pictures(3), bank=32, untrained=oracle).summary()
    assert same["mrr_untrained_target"] == same["mrr"]
