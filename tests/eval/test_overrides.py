"""Every key that an evaluation accepts is used, and every other one is refused with a reason."""

from __future__ import annotations

import pytest

from iwm_fast.config import Config, DataConfig
from iwm_fast.config.schema_table import rows
from iwm_fast.errors import UserError
from iwm_fast.eval.overrides import check_overrides, for_evaluation

IMAGES = ("mrr", "knn", "linear", "attentive", "equivariance")
JITTER = {f"actions.{name}" for name in ("strength", "brightness", "contrast", "saturation", "hue")}
DECODING = {
    f"data.{name}"
    for name in ("device", "threads", "readers", "max_pixels", "max_bad_fraction", "wait_s", "hw_decoder_load")
}
OF_IMAGES = DECODING | {"data.source", "data.store_timeout", "data.store_attempts"}


def refusal(key, **options):
    """Return the error's text, or None if the key is accepted."""
    try:
        check_overrides([f"{key}=1"], **options)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"command": "evaluate", "what": IMAGES}, OF_IMAGES | JITTER | {"eval.bank", "eval.mrr_images"}),
        ({"command": "evaluate", "what": ("knn",)}, OF_IMAGES | JITTER | {"eval.bank"}),
        ({"command": "evaluate", "what": ("mrr",), "external": True}, DECODING | {"eval.bank"}),
        ({"command": "evaluate", "what": ("rollout",), "external": True}, DECODING | {"eval.horizon"}),
        ({"command": "finetune"}, OF_IMAGES),
    ],
    ids=["images", "images, no mrr", "triplets, mrr", "triplets, roll-outs", "finetune"],
)
def test_the_keys_that_are_taken_are_those_with_a_use(options, keys):
    said = {row.key: refusal(row.key, **options) for row in rows()}
    assert {key for key in said if said[key] is None} == keys | {"plugins"}  # everywhere
    for key, words in said.items():
        assert words is None or (words.startswith(f"command line: {key}") and words.isprintable())


@pytest.mark.parametrize(
    ("word", "external", "reason"),
    [
        ("eval.images=200", False, "it is for evaluation while training; here all images are read"),
        ("eval.every_steps=1", False, "it is for evaluation while training; leave it out"),
        ("eval.root=x", False, "--data names the data of this evaluation"),
        ("data.root=x", False, "--data names the data of this evaluation"),
        ("data.prefetch=9", False, "it is for training only"),
        ("eval.horizon=2", False, "it is for roll-outs, which need triplets"),
        ("eval.mrr_images=2", True, "it is for images; for triplets, eval.bank or --images"),
        ("actions.hue=0.1", True, "a run on triplets has no jitter"),
        ("data.store_timeout=3", True, "triplets are local files"),
        ("train.lr=1", False, "evaluate can override data.source, .* only; the rest is the run's"),
    ],
)
def test_the_reason_is_said(word, external, reason):
    with pytest.raises(UserError, match=reason):
        check_overrides([word], command="evaluate", external=external, what=("mrr", "rollout"))


def test_what_trained_a_run_does_not_say_how_other_images_are_read():
    config = Config(data=DataConfig(source="webdataset", threads=3, wait_s=7.0))
    plain = for_evaluation(config, ["data.threads=2"]).data
    assert (plain.source, plain.wait_s, plain.threads) == ("auto", 0.0, 3)
    asked = for_evaluation(config, ["data.source=webdataset", " data.wait_s = 7"]).data
    assert (asked.source, asked.wait_s) == ("webdataset", 7.0)
