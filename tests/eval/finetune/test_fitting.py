from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.errors import UserError
from iwm_fast.eval.feature_cache import Features
from iwm_fast.eval.features import read_features
from iwm_fast.eval.finetune import fitting
from iwm_fast.eval.finetune.fitting import Plan, fit, measure
from iwm_fast.eval.finetune.modes import kept_for, reader_builder
from iwm_fast.eval.finetune.tasks import Task, batches, steps_per_epoch
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.models.blocks import LimitedMlp
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape

MODEL, SPACE = tiny_model(tiny_config())


def task(mode, count=40, name="light"):
    """Dark and light pictures."""
    parts = []
    for seed in (0, 1):
        labels = np.arange(count) % 2
        images = pictures(count, seed) // 2
        images[torch.from_numpy(labels) == 1] += 90
        split = TensorSplit(images, labels, ("dark", "light"))
        parts.append(read_features([MODEL.target_encoder], split, kept_for(mode, dense=False))[0])
    return Task.of(name, HeadShape(2, dense=False), *parts)


def builder(mode, tasks, init="pretrained"):
    return reader_builder(MODEL, mode, init, {one.name: one.shape for one in tasks}, "target")


@pytest.mark.parametrize("mode", ["linear", "attentive", "predictor", "end-to-end", "multitask"])
def test_every_mode_learns_what_can_be_learned(mode):
    tasks = [task(mode)] + ([task(mode, 30, "dark")] if mode == "multitask" else [])
    before = copy.deepcopy(MODEL.state_dict())
    state = torch.get_rng_state()
    found = fit(builder(mode, tasks), tasks, Plan(rates=(3e-3,), steps=40, batch=16, flip=mode == "end-to-end"))
    assert torch.equal(torch.get_rng_state(), state)
    for one in tasks:
        assert measure(found.reader, one, one.test).main() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


def test_a_rate_among_several_trains_as_it_does_alone():
    """One pass serves all rates, and none affects another."""
    one = task("predictor")
    build = builder("predictor", [one])
    alone = fit(build, [one], Plan(rates=(1e-3,), steps=7, batch=16))
    both = fit(build, [one], Plan(rates=(1e-3, 1e-5), steps=7, batch=16))
    assert set(both.held_out) == {1e-3, 1e-5}
    assert both.held_out[1e-3] == alone.held_out[1e-3]
    if both.rate == 1e-3:
        for name, value in alone.reader.state_dict().items():
            torch.testing.assert_close(both.reader.state_dict()[name], value, rtol=0, atol=0)


def test_the_rate_is_chosen_by_the_images_held_out():
    one = task("linear")
    found = fit(builder("linear", [one]), [one], Plan(rates=(1e-7, 1e-2), steps=30, batch=16))
    assert found.rate == 1e-2
    assert found.held_out[1e-2] == measure(found.reader, one, one.train, held=True).main()
    assert found.held_out[1e-2] > found.held_out[1e-7]


def test_held_out_images_are_never_learned_from():
    one = task("linear")
    stream = batches(one, 16, seed=0)
    seen = torch.cat([next(stream)[0] for _ in range(9)])[:, 0]
    held = torch.from_numpy(one.train.values[one.held])
    assert one.held.sum() == 4
    assert not (seen[:, None] == held).all(dim=2).any()
    assert len(seen.unique(dim=0)) == 36


def test_a_pretrained_predictor_moves_a_tenth_as_fast():
    """AdamW's first step is the learning rate, whatever the gradient."""
    one = task("predictor")
    build = builder("predictor", [one])
    start = MODEL.predictor.proj.weight.detach()
    for factor, rate in ((1.0, 1e-3), (0.1, 1e-4)):
        plan = Plan(rates=(1e-3,), steps=1, batch=16, weight_decay=0.0, predictor_factor=factor)
        found = fit(build, [one], plan)
        step = (found.reader.predictor.proj.weight.detach() - start).abs()
        assert float(step.max()) == pytest.approx(rate, rel=1e-2)


def test_random_and_pretrained_predictors_have_as_many_parameters_and_other_weights():
    one = task("predictor")
    readers = [builder("predictor", [one], init)() for init in ("pretrained", "random")]
    counts = [sum(p.numel() for p in reader.parameters() if p.requires_grad) for reader in readers]
    assert counts[0] == counts[1] > sum(p.numel() for p in MODEL.predictor.parameters())
    assert torch.equal(readers[0].predictor.proj.weight, MODEL.predictor.proj.weight)
    assert not torch.equal(readers[1].predictor.proj.weight, MODEL.predictor.proj.weight)


def test_every_mlp_has_the_workspace_of_the_configuration():
    mine = IWM(MODEL.config.model_copy(update={"mlp_workspace_mib": 3}), MODEL.action_dim)
    reader = reader_builder(mine, "end-to-end", "pretrained", {"light": HeadShape(2, dense=False)}, "target")()
    for module in (mine, reader):
        limits = [part.workspace for part in module.modules() if isinstance(part, LimitedMlp)]
        assert limits
        assert set(limits) == {3 * 2**20}


def test_tasks_share_the_predictor_and_each_has_a_token_of_its_own():
    tasks = [task("multitask", name=name) for name in ("one", "train")]  # torch's dictionaries reject the name train
    reader = builder("multitask", tasks)().eval()
    tokens = MODEL.encode(pictures(3), "target").detach()
    for parameter in reader.heads.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        reader.heads["1"].load_state_dict(reader.heads["0"].state_dict())
    assert not torch.allclose(reader(tokens, "one"), reader(tokens, "train"))  # the token distinguishes them
    reader(tokens, "one").sum().backward()
    assert reader.task_tokens["0"].grad.abs().sum() > 0
    assert reader.task_tokens["1"].grad is None
    with torch.no_grad():
        reader.task_tokens["1"].copy_(reader.task_tokens["0"])
    torch.testing.assert_close(reader(tokens, "one"), reader(tokens, "train"))


def test_the_predictor_is_conditioned_on_no_change():
    one = task("predictor")
    reader = builder("predictor", [one])()
    tokens = MODEL.encode(pictures(3), "target").detach()
    want = reader.heads["0"](MODEL.predict(tokens, torch.zeros(3, SPACE.dim)))
    torch.testing.assert_close(reader(tokens, "light"), want)
    torch.testing.assert_close(reader(pictures(3), "light"), want)  # images go through the same encoder


def test_a_loss_that_is_not_finite_is_said_and_a_finite_rate_beside_it_is_used():
    one = task("attentive")
    one.train.values[:] = np.inf
    with pytest.raises(UserError, match="not finite; lower it"):
        fit(builder("attentive", [one]), [one], Plan(rates=(1e-3,), steps=2, batch=16))
    one = task("attentive")
    found = fit(builder("attentive", [one]), [one], Plan(rates=(1e35, 1e-3), steps=20, batch=16))
    assert found.rate == 1e-3
    assert found.held_out[1e35] is None


def test_a_reader_that_its_last_update_broke_is_not_chosen():
    """The loss of the last step is that of the weights before it."""
    one = task("attentive")
    found = fit(builder("attentive", [one]), [one], Plan(rates=(1e35, 1e-3), steps=1, batch=16))
    assert (found.rate, found.held_out[1e35]) == (1e-3, None)
    with pytest.raises(UserError, match=r"--lr 1e\+35: the loss is not finite; lower it"):
        fit(builder("attentive", [one]), [one], Plan(rates=(1e35,), steps=1, batch=16))


def test_images_without_a_known_pixel_are_not_held_out():
    """Rows 0, 10, ... would be, and have no score."""
    labels = np.random.default_rng(0).integers(0, 2, (40, 8, 8)).astype(np.uint8)
    labels[::10] = 255
    values = np.zeros((40, 4, 3), np.float32)
    held = Task.of("masks", HeadShape(2, dense=True), Features(values, labels), Features(values, labels)).held
    assert held.sum() == 4
    assert not held[::10].any()
    labels[1:] = 255
    with pytest.raises(ValueError, match="masks: of its 40 training masks too few have a pixel that is not 255"):
        Task.of("masks", HeadShape(2, dense=True), Features(values, labels), Features(values, labels))


@pytest.mark.parametrize(
    ("rows", "size", "parts"), [(130, 128, 2), (128, 128, 1), (9000, 64, 141), (3, 1, 1), (9, 2, 4)]
)
def test_an_epoch_is_divided_into_equal_batches(rows, size, parts):
    assert steps_per_epoch(rows, size) == parts


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="few has 2 training images, too few to hold out a tenth"):
        task("linear", 2, "few")


def test_the_curve_has_a_point_per_pass_and_changes_nothing_that_is_learned(monkeypatch):
    one = task("end-to-end")
    plan = Plan(rates=(3e-3, 1e-5), steps=18, batch=12, flip=True)  # 36 images to learn from: 3 steps per pass
    said = []
    found = fit(builder("end-to-end", [one]), [one], plan, say=said.append)
    assert [point.step for point in found.curve] == [3, 6, 9, 12, 15, 18]
    assert found.rate == 3e-3
    assert found.curve[-1].loss < found.curve[0].loss
    assert all(0 <= point.test <= 1 for point in found.curve[:-1])
    assert found.curve[-1].test is None
    assert said == list(found.curve[:-1])  # this rate's loss is the lowest at each
    assert found.curve_images == {"light": 40}
    monkeypatch.setattr(fitting._Curve, "_tests", lambda self: [0.0] * len(self._readers))
    unseen = fit(builder("end-to-end", [one]), [one], plan)
    assert [point.loss for point in unseen.curve] == [point.loss for point in found.curve]
    for name, value in unseen.reader.state_dict().items():
        assert torch.equal(value, found.reader.state_dict()[name]), name


def test_the_curves_last_score_before_the_end_is_of_the_reader_as_it_was():
    """A fit that is broken off after as many steps, with the same schedule, scores what the point says."""
    one = task("linear")
    build = builder("linear", [one])
    seen = []
    plan = Plan(rates=(1e-2,), steps=15, batch=12)

    def watched():
        reader = build()
        seen.append(reader)
        return reader

    scores = []
    fit(watched, [one], plan, say=lambda point: scores.append((point.test, measure(seen[0], one, one.test).main())))
    assert len(scores) == 4
    assert all(told == measured for told, measured in scores)


@pytest.mark.parametrize(
    ("steps", "passes", "points"), [(40, 20.0, 20), (4000, 1000.0, 20), (100, 1.0, 8), (3, 0.5, 3), (1, 9.0, 1)]
)
def test_a_curve_has_few_points_and_ends_at_the_last_step(steps, passes, points):
    marks = fitting._marks(steps, passes)
    assert (len(marks), max(marks)) == (points, steps)
    assert min(marks) >= 1


def test_a_curve_scores_a_bounded_number_of_test_images():
    one = task("linear", count=200)
    found = fit(builder("linear", [one]), [one], Plan(rates=(1e-3,), steps=10, batch=20))
    assert found.curve_images == {"light": 64}
