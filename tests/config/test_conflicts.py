from types import SimpleNamespace

import pytest

from iwm_fast.config import load_config, packaged_config
from iwm_fast.config.conflicts import conflicts, require_a_step
from iwm_fast.cost.report import ImageCount, warnings
from iwm_fast.errors import UserError


def config(*overrides):
    usual = {"train.epochs": "10", "train.global_batch": "32"}
    given = " ".join(overrides)
    if "train.warmup_" not in given:
        usual["train.warmup"] = "0"
    if "checkpoint.every_epochs" not in given:
        usual["checkpoint.every_steps"] = "50"
    words = (*(f"{key}={value}" for key, value in usual.items()), *overrides)
    return load_config(packaged_config("vit_tiny_p4_32.yaml"), words)


def test_settings_that_go_together_are_not_spoken_of():
    # 10 passes over 320 images are 100 steps
    assert conflicts(config("train.warmup=50", "eval.root=x", "eval.every_steps=100"), 320) == []
    assert conflicts(config("train.steps=100"), 320) == []
    assert conflicts(config("train.steps=95"), 320) == []
    assert conflicts(config("train.schedule_steps=100", "train.warmup=50"), 7_000_000) == []
    assert conflicts(config("checkpoint.keep_every=100"), 320) == []
    assert conflicts(config("train.optimizer=muon", "train.lr=2e-3"), 320) == []


# Of 320 images, unless a number stands before: 100 steps.
LINES = {
    "train.warmup=25022": (
        "train.warmup is 25,022 steps and the training 100: the learning rate does not reach its peak; set "
        "train.warmup to about 10, or train longer (train.epochs)"
    ),
    "train.warmup_epochs=8": (
        "train.warmup_epochs 8 is 80 steps and the training 100: the learning rate rises for more than half of the "
        "training; set train.warmup_epochs to about 1, or train longer (train.epochs)"
    ),
    "train.warmup_ratio=1": (
        "train.warmup_ratio 1 is 100 steps and the training 100: the learning rate does not reach its peak; set "
        "train.warmup_ratio to about 0.1, or train longer (train.epochs)"
    ),
    "checkpoint.every_epochs=11 eval.root=x eval.every_epochs=20": (
        "the training ends at step 100, so there is no evaluation (eval.every_epochs 20: 200 steps) and one checkpoint "
        "only, at its end (checkpoint.every_epochs 11: 110 steps)"
    ),
    "train.warmup=100": "train.warmup is 100 steps and the training 100: the learning rate does not reach",
    "train.warmup=51": "train.warmup is 51 steps and the training 100: the learning rate rises for more",
    "train.schedule_steps=60 train.warmup=60": "train.warmup is 60 steps and the training 60: the learning rate",
    "train.steps=150 model.target=shared": (
        "train.steps is 150 and the schedules end at step 100: after it the learning rate stays at 0.001 of its peak;"
    ),
    "train.steps=150 train.ema=[0.9,1.0]": (
        "train.steps is 150 and the schedules end at step 100: after it the learning rate stays at 0.001 of its "
        "peak and train.ema at 1; set train.schedule_steps=150, or train.steps=100"
    ),
    "train.steps=50 train.schedule_steps=5000": (
        "train.steps stops training at step 50 of the schedules' 5,000; for schedules of that length set "
        "train.schedule_steps=50"
    ),
    "train.steps=50 train.warmup=50 train.schedule_steps=5000 train.warmup=60": (
        "train.steps stops training at step 50 of the schedules' 5,000, within the warm-up of 60; for schedules"
    ),
    "train.optimizer=muon": (
        "train.optimizer is muon and train.lr 0.001, the default, which suits adamw: muon learned most at 0.008 with a "
        "small encoder; try train.lr from 0.004 to 0.016"
    ),
    "train.global_batch=321": (
        "train.global_batch is 321 and there are 320 images: a step repeats images; lower it to 320 or fewer"
    ),
    "eval.root=x eval.every_steps=101": (
        "the training ends at step 100, so there is no evaluation (eval.every_steps 101)"
    ),
    "checkpoint.every_steps=101": (
        "the training ends at step 100, so there is one checkpoint only, at its end (checkpoint.every_steps 101)"
    ),
    "eval.root=x eval.every_steps=500 checkpoint.every_steps=1000": (
        "the training ends at step 100, so there is no evaluation (eval.every_steps 500) and one checkpoint only, at "
        "its end (checkpoint.every_steps 1,000)"
    ),
    "checkpoint.every_steps=20 checkpoint.keep_every=30 train.schedule_steps=50": (
        "the training ends at step 50, so there is no checkpoint that is never removed (checkpoint.keep_every 30 and "
        "every_steps 20 first coincide at step 60)"
    ),
    "checkpoint.keep_every=1000": (
        "the training ends at step 100, so there is no checkpoint that is never removed (checkpoint.keep_every 1,000 "
        "and every_steps 50 first coincide at step 1,000)"
    ),
}


@pytest.mark.parametrize("words", LINES)
def test_what_may_not_be_meant_gets_one_line_with_what_to_set(words):
    said = [line for line in conflicts(config(*words.split()), 320) if line.startswith(LINES[words])]
    assert len(said) == 1
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    ("words", "images"),
    [(("train.epochs=0.01",), 320), (("train.global_batch=2048", "train.epochs=1"), 1000), ((), 1)],
    ids=["few passes", "large batch", "one image"],
)
def test_less_than_a_step_is_refused(words, images):
    with pytest.raises(UserError, match=r"images are 0\.\d+ steps; lower train\.global_batch"):
        require_a_step(config(*words), images)
    require_a_step(config(*words, "train.steps=1"), images)
    require_a_step(config(*words, "train.schedule_steps=1"), images)


def test_half_a_step_is_one():
    require_a_step(config("train.epochs=1", "train.global_batch=8"), 4)


@pytest.mark.parametrize(("origin", "said"), [("given", 1), ("counted", 1), ("assumed", 0)])
def test_the_plan_says_so_too_of_images_that_are_known(origin, said):
    time = SimpleNamespace(forward=1.0, backward=1.0, launches=0.0)
    lines = warnings(config("train.warmup=25022"), ImageCount(320, origin, ""), time)
    assert [line.startswith("train.warmup is 25,022 steps and the training 100: ") for line in lines] == [True] * said
