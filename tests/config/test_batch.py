import pytest

from iwm_fast.config import dump_config, load_config, packaged_config
from iwm_fast.config.batch import in_steps, known_in_steps, said_in_steps, warmup_steps
from iwm_fast.errors import UserError

IMAGES = 320


def config(*overrides):
    """10 epochs of 320 images in batches of 32 are 100 steps; the file's own warm-up is 100 steps."""
    return load_config(packaged_config("vit_tiny_p4_32.yaml"), ("train.epochs=10", "train.global_batch=32", *overrides))


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ((), 100),
        (("train.warmup=7",), 7),
        (("train.warmup_epochs=2.5",), 25),
        (("train.warmup_epochs=0",), 0),
        (("train.warmup_ratio=0.07",), 7),
        (("train.warmup_ratio=0.1", "train.schedule_steps=50"), 5),
        (("train.warmup_ratio=0",), 0),
        (("train.warmup_epochs=2", "train.warmup_epochs=null"), 100),
        (("train.warmup=0", "train.warmup_epochs=1"), 10),
        (("model.predictor.depth=2", "train.warmup_epochs=1"), 10),
    ],
)
def test_warm_up_comes_to_steps_and_an_override_replaces_the_unit_of_the_file(words, steps):
    assert warmup_steps(config(*words), IMAGES) == steps
    assert in_steps(config(*words), IMAGES).train.warmup == steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.warmup=5", "train.warmup_epochs=2"), "warmup is 5, warmup_epochs is 2; give only one of warmup, "),
        (("train.warmup_ratio=0.1", "train.warmup_epochs=2"), "warmup_epochs is 2, warmup_ratio is 0.1; give only one"),
        (("checkpoint.every_steps=5", "checkpoint.every_epochs=2"), "every_steps is 5, every_epochs is 2; give only"),
        (("eval.root=x", "eval.every_steps=5", "eval.every_epochs=2"), "every_steps is 5, every_epochs is 2; give"),
        (("eval.every_epochs=2",), "eval.every_epochs is set and eval.root is not; set eval.root"),
    ],
)
def test_one_thing_in_two_units_is_refused(words, message):
    with pytest.raises(UserError) as error:
        config(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_units_in_one_file_are_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {warmup: 5, warmup_ratio: 0.1}\n")
    with pytest.raises(UserError, match=r"c\.yaml:1: train: warmup is 5, warmup_ratio is 0\.1; give only one of"):
        load_config(file)


def test_intervals_in_epochs_come_to_steps_and_are_recorded_as_given(tmp_path):
    given = config("checkpoint.every_epochs=2", "eval.every_epochs=0.01", "eval.root=x", "train.warmup_ratio=0.1")
    counted = in_steps(given, IMAGES)
    assert (counted.checkpoint.every_steps, counted.eval.every_steps) == (20, 1)
    assert said_in_steps(given, IMAGES) == [
        "train.warmup_ratio 0.1 is 10 of 100 steps",
        "checkpoint.every_epochs 2 is every 20 steps",
        "eval.every_epochs 0.01 is every step",
    ]
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(given))
    assert load_config(file) == given
    assert load_config(file, ["checkpoint.every_steps=5"]).checkpoint.every_epochs is None
    assert in_steps(counted, IMAGES) == counted


def test_a_configuration_says_its_steps_where_no_image_is_counted():
    assert known_in_steps(config()) == []
    assert known_in_steps(config("train.warmup_ratio=0.1", "train.schedule_steps=50")) == [
        "train.warmup_ratio 0.1 is 5 of 50 steps"
    ]
    (line,) = known_in_steps(config("train.warmup_epochs=2"))
    assert line.startswith("train.warmup_epochs 2: depends on the number of images; ")
