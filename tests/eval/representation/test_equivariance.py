from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference_views
import torch
from made_images import picture
from sklearn.metrics import r2_score
from torch import nn
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import ActionsConfig
from iwm_fast.data.views.sampling import draw_bank, draw_views
from iwm_fast.errors import UserError
from iwm_fast.eval.evaluate import evaluate_model
from iwm_fast.eval.representation.equivariance import measure_equivariance
from iwm_fast.eval.representation.view_pairs import draw_pairs, left_out, left_out_line
from iwm_fast.eval.ridge import fit_ridge
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.eval.stats import bootstrap_interval, bootstrap_rows

NOTHING = {"grayscale_probability": 0.0, "blur_probability": 0.0, "solarize_probability": 0.0}
ACTIONS = ActionsConfig(**NOTHING)
GEOMETRIC = {"groups": ("photometric", "geometric"), "flip_probability": 0.0, "rotation_probability": 0.0}
STILL = NOTHING | {"strength": 0.0}


class Seen(nn.Module):
    """Stands in for an encoder of one token: its output for images is `of`(images) (B, D)."""

    def __init__(self, of):
        super().__init__()
        self.of = of
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.of(images.float())


class Model(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.target_encoder = Seen(of)


def measure(of, **changes):
    options = {"actions": ACTIONS, "train": pictures(300), "test": pictures(200, seed=1), "which": "target"}
    return measure_equivariance([Model(of)], **(options | changes))[0]


def content(images):
    """Return what jitter leaves unchanged: here, a random code of the picture's order of levels."""
    grey = images.mean(dim=3).flatten(1)
    return (grey > grey.median(dim=1, keepdim=True).values).float() - 0.5


def test_an_encoder_that_keeps_the_colours_is_equivariant_and_one_of_content_alone_is_invariant():
    """Mean colour and contrast of even noise reveal its jitter: the pictures' own means hardly vary."""
    colours = measure(lambda x: torch.cat([x.mean(dim=(1, 2)), x.std(dim=(1, 2)), x.square().mean(dim=(1, 2))], dim=1))
    constant = measure(lambda x: torch.ones(len(x), 3))
    order = measure(content)
    assert colours.r2["brightness"] > 0.8
    assert colours.equivariance > 0.5
    assert max(order.r2.values()) < 0.2
    assert order.invariance > 0.5
    assert colours.equivariance > 2 * order.equivariance
    assert constant.equivariance == 0
    assert constant.cosine_same == pytest.approx(1)
    for found in (colours, order):
        for name, (low, high) in found.r2_interval.items():
            assert low <= found.r2[name] <= high
        assert found.equivariance_interval[0] <= found.equivariance <= found.equivariance_interval[1]
        assert found.invariance_interval[0] <= found.invariance <= found.invariance_interval[1]


def test_noise_is_neither():
    found = measure(lambda x: torch.randn(len(x), 8, generator=torch.Generator().manual_seed(int(x.sum()) % 2**31)))
    assert found.equivariance < 0.05
    assert abs(found.invariance) < 0.3


def test_the_scale_of_the_cosine_takes_out_what_all_images_share():
    """A large constant moves every cosine near 1, and hardly changes the scaled value."""
    plain = measure(content)
    shifted = measure(lambda x: torch.cat([content(x), torch.full((len(x), 1), 50.0)], dim=1))
    assert shifted.cosine_other > 0.99 > plain.cosine_other
    assert shifted.invariance == pytest.approx(plain.invariance, abs=0.05)


def test_pairs_are_what_the_action_says_and_depend_on_seed_and_row_only():
    images = pictures(6, side=12)
    pairs = draw_pairs(images, ACTIONS)
    assert pairs.names == ActionSpace().names
    part = draw_pairs(images[2:4], ACTIONS, first_sample=2)
    assert torch.equal(part.second, pairs.second[2:4])
    assert np.array_equal(part.action, pairs.action[2:4])
    assert not np.array_equal(draw_pairs(images, ACTIONS, seed=1).action, pairs.action)
    only = draw_pairs(images, ActionsConfig(contrast=0.0, saturation=0.0, hue=0.0, **NOTHING))
    assert not only.action[:, 1:].any()
    factor = only.second.float().mean(dim=(1, 2, 3)) - only.first.float().mean(dim=(1, 2, 3))
    assert np.array_equal(np.sign(factor.numpy()), np.sign(only.action[:, 0]))
    # The component is a difference of factors over 0.8, in either form of the predictor's action.
    ratio = factor / images.float().mean(dim=(1, 2, 3)) / ActionSpace().components[0].range
    np.testing.assert_allclose(ratio.numpy(), only.action[:, 0], atol=0.05)


def test_r2_is_that_of_scikit_learn():
    config = tiny_config()
    model, _ = tiny_model(config)
    train, test = pictures(60), pictures(30, seed=1)
    (found,) = measure_equivariance([model], ACTIONS, train, test, which="context")
    rows = []
    for images, first in ((train, 0), (test, 2**32)):
        pairs = draw_pairs(images, ACTIONS, first_sample=first)
        with torch.no_grad():
            z = [model.encode(v, "context").mean(1).double().numpy() for v in (pairs.first, pairs.second)]
        rows.append((np.hstack(z), pairs.action[:, :4]))
    predicted = fit_ridge(*rows[0]).predict(rows[1][0])
    want = r2_score(rows[1][1], predicted, multioutput="raw_values")
    np.testing.assert_allclose(list(found.r2.values()), want, rtol=1e-6)
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*np.hsplit(rows[1][0], 2), strict=True)]
    assert found.cosine_same == pytest.approx(np.mean(cosine))


def test_the_bootstrap_of_a_mean_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    ends = bootstrap_rows(values[:, None], lambda means: means)
    assert np.ravel(ends) == pytest.approx(bootstrap_interval(values), abs=0.02)
    with pytest.raises(ValueError, match="table has shape"):
        bootstrap_rows(np.zeros((0, 2)), lambda means: means)


def test_evaluate_measures_it_beside_the_untrained_network_or_says_why_not():
    config = tiny_config()
    model, space = tiny_model(config)
    train, test = TensorSplit(pictures(40)), TensorSplit(pictures(20, seed=1))
    found = evaluate_model(model, config, space, train=train, test=test, what=("equivariance",))
    assert found["equivariance_pairs"] == [40, 20]
    for name in ("equivariance", "invariance", "cosine_same", "cosine_other", "r2_hue"):
        assert isinstance(found[name], float)
        assert isinstance(found[f"{name}_untrained"], float)
    assert "not_run" not in found
    assert found["equivariance_left_out"]["solarize"].endswith("pairs have it; 10 are needed")
    for options, reason in (
        ({"train": None}, "no training images"),
        ({"train": TensorSplit(pictures(3))}, "3 training and 20 test images are too few"),
    ):
        found = evaluate_model(model, config, space, test=test, what=("equivariance",), **options)
        assert reason in found["not_run"]["equivariance"]
    with pytest.raises(ValueError, match="train has 4 images"):
        measure_equivariance([model], ACTIONS, pictures(4), pictures(4), which="target")


@pytest.mark.parametrize("groups", [("photometric",), ("photometric", "geometric")])
def test_a_pair_is_what_the_reference_makes_of_the_parameters_that_training_would_sample(groups):
    """Except that jitter is always applied, and the views share a crop that no action encodes."""
    chances = dict.fromkeys(NOTHING, 0.5)
    actions = ActionsConfig(groups=groups, crop_scale=(0.6, 1.0), **chances)
    images = torch.stack([torch.from_numpy(picture(24, 24, seed=seed)) for seed in range(7)])
    pairs = draw_pairs(images, actions, first_sample=2**32)
    told = ActionSpace(groups).decode(pairs.action)
    samples = 2**32 + np.arange(7)
    views = draw_views(actions, 0, np.zeros(7, np.int64), samples, np.full((7, 2), 24))
    jitters = [draw_bank(actions, 0, int(sample), 2) for sample in samples]
    assert 0 < views.grayscale.sum() < 7
    for row, (image, jitter) in enumerate(zip(images.numpy(), jitters, strict=True)):
        ends = [image, image]
        if len(groups) == 2:
            ends = [reference_views.place(image, g, row, 24) for g in (views.source_geometry, views.target_geometry)]
        own = replace(views.take([row]), source=jitter.take([0]), target=jitter.take([1]))
        assert reference_views.error(pairs.first[row].numpy(), reference_views.source(ends[0], own, 0)) < 2
        assert reference_views.error(pairs.second[row].numpy(), reference_views.target(ends[1], own, 0)) < 2
        assert told["grayscale"][row] == views.grayscale[row]
        assert told["blur_sigma"][row] == pytest.approx(views.blur_sigma[row])
        assert told["solarize_threshold"][row] == views.solarize_threshold[row]
        assert told["brightness"][row] == pytest.approx(jitter.brightness[1] - jitter.brightness[0])
        if len(groups) == 2:
            assert told["flip"][row] == (views.source_geometry.flip[row] != views.target_geometry.flip[row])


def quarters(images):
    """Return mean levels of the four quarters."""
    return torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=3), 2).flatten(1)


def sides(images):
    """Return left minus right: its sign changes when the view is mirrored."""
    q = quarters(images)
    return torch.stack([q[:, 0] - q[:, 1], q[:, 2] - q[:, 3]], dim=1)


def lit(count, seed):
    """Return grainy colours, brighter towards one corner, which shows orientation and position."""
    ramp = torch.linspace(-35, 35, 8)
    grain = 0.25 * (pictures(count, seed).float() - 120)
    return (128 + grain + ramp[:, None, None] + ramp[None, :, None]).to(torch.uint8)


def halves(count, seed):
    """Return pictures whose left and right half differ, one way as often as the other."""
    side = torch.randint(0, 2, (count, 1, 1, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    step = torch.where(torch.arange(8) < 4, -30, 30)[None, None, :, None]
    return (pictures(count, seed) + side * step).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "actions", "sees", "made"),
    [
        ("grayscale", STILL | {"grayscale_probability": 0.2}, lambda x: x.std(dim=3).mean(dim=(1, 2))[:, None], lit),
        ("blur", STILL | {"blur_probability": 0.2}, lambda x: x.diff(dim=2).abs().mean(dim=(1, 2)), lit),
        ("blur_sigma", STILL | {"blur_probability": 0.5}, lambda x: x.diff(dim=2).abs().mean(dim=(1, 2)), lit),
        ("solarize", STILL | {"solarize_probability": 0.1}, lambda x: x.amax(dim=(1, 2)), lit),
        ("crop_x", STILL | GEOMETRIC, quarters, lit),
        ("crop_y", STILL | GEOMETRIC, quarters, lit),
        ("flip", STILL | GEOMETRIC | {"flip_probability": 0.5, "crop_scale": (1.0, 1.0)}, sides, halves),
        ("rotation_1", STILL | GEOMETRIC | {"rotation_probability": 0.75, "crop_scale": (1.0, 1.0)}, quarters, lit),
        ("rotation_2", STILL | GEOMETRIC | {"rotation_probability": 0.75, "crop_scale": (1.0, 1.0)}, quarters, lit),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_component_is_regressed_where_the_encoder_sees_it_and_not_where_it_is_blind(name, actions, sees, made):
    options = {"actions": ActionsConfig(**actions), "train": made(300, 0), "test": made(200, 1)}
    seeing, blind = measure(sees, **options), measure(lambda x: torch.ones(len(x), 2), **options)
    low, high = seeing.r2_interval[name]
    assert low <= seeing.r2[name] <= high
    assert low > 0.2  # what a box shows is not linear in its position
    assert abs(blind.r2[name]) < 0.05
    assert blind.equivariance < 0.05
    assert seeing.equivariance == pytest.approx(np.mean([max(0, value) for value in seeing.r2.values()]))


def test_sigma_is_asked_of_the_blurred_pairs_alone():
    actions = ActionsConfig(**(STILL | {"blur_probability": 0.5}))
    see = lambda x: x.diff(dim=2).abs().mean(dim=(1, 2))  # noqa: E731  (the encoder's function)
    found = measure(see, actions=actions)
    rows = []
    for images, first in ((pictures(300), 0), (pictures(200, seed=1), 2**32)):
        pairs = draw_pairs(images, actions, first_sample=first)
        blurred = pairs.action[:, pairs.names.index("blur")] == 1
        z = [see(views.float()).double().numpy()[blurred] for views in (pairs.first, pairs.second)]
        rows.append((np.hstack(z), pairs.action[blurred][:, [pairs.names.index("blur_sigma")]]))
    want = r2_score(rows[1][1], fit_ridge(*rows[0]).predict(rows[1][0]))
    assert found.r2["blur_sigma"] == pytest.approx(want, rel=1e-5)


def test_every_component_of_the_actions_is_measured_or_left_out_by_name():
    groups = ("photometric", "geometric", "compression")
    actions = ActionsConfig(groups=groups, saturation=0.0, blur_probability=0.0)
    found = measure(quarters, actions=actions, train=lit(120, 0), test=lit(90, 1))
    assert set(found.r2) | set(found.left_out) == set(ActionSpace(actions.groups).names)
    assert not set(found.r2) & set(found.left_out)
    assert all(np.isfinite([value, *found.r2_interval[name]]).all() for name, value in found.r2.items())
    assert {"grayscale", "crop_w", "flip", "rotation_3", "compression", "compression_quality"} <= set(found.r2)
    assert found.left_out["saturation"] == "actions.saturation is 0"
    assert found.left_out["blur"] == found.left_out["blur_sigma"] == "actions.blur_probability is 0"
    assert "the same in all" in found.left_out["solarize_threshold"]
    line = left_out_line(found.left_out)
    assert "blur, blur_sigma (actions.blur_probability is 0)" in line


def test_too_few_flagged_pairs_are_said_with_their_number():
    actions = ActionsConfig(**(STILL | {"grayscale_probability": 0.5, "blur_probability": 0.5}))
    training, test = np.zeros((40, 9)), np.zeros((30, 9))
    names = ActionSpace().names
    training[:20, names.index("grayscale")] = test[:9, names.index("grayscale")] = 1
    training[:9, names.index("blur")] = 1
    test[:20, names.index("blur")] = 1
    said = left_out(actions, training=training, test=test)
    assert said["grayscale"] == "9 of 30 test pairs have it; 10 are needed"
    assert said["blur"] == "9 of 40 training pairs have it; 10 are needed"
    assert said["blur_sigma"] == "9 of 40 training pairs have a blur; 10 are needed"
    assert said["hue"] == "actions.strength is 0"
    test[:, names.index("grayscale")] = np.arange(30) != 3
    assert left_out(actions, training=training, test=test)["grayscale"].startswith("1 of 30 test pairs lack it")


def test_where_nothing_varies_it_says_so_and_keeps_what_else_was_measured():
    config = tiny_config()
    model, space = tiny_model(config)
    still = config.model_copy(update={"actions": ActionsConfig(**STILL)})
    with pytest.raises(UserError, match="no component of the action can be regressed"):
        measure_equivariance([model], still.actions, pictures(5), pictures(2), which="target")
    train = TensorSplit(pictures(40), np.arange(40) % 2, ("a", "b"))
    test = TensorSplit(pictures(20, seed=1), np.arange(20) % 2, ("a", "b"))
    found = evaluate_model(model, still, space, train=train, test=test, what=("knn", "equivariance"))
    assert "knn" in found
    assert "actions.strength is 0" in found["not_run"]["equivariance"]
