from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from worlds import pictures, tiny_config, tiny_model

from iwm_fast.config import ActionsConfig, Config
from iwm_fast.eval.evaluate import evaluate_model, untrained_model
from iwm_fast.eval.registry import names
from iwm_fast.eval.splits import TensorSplit
from iwm_fast.eval.world_model.examples import ranked_examples

CLASSES = ("dark", "light")


def labelled(count: int, seed: int) -> TensorSplit:
    """Write dark and light pictures, class by class as files are sorted."""
    images = pictures(count, seed) // 2
    labels = np.sort(np.arange(count) % 2)
    images[torch.from_numpy(labels) == 1] += 90
    return TensorSplit(images, labels, CLASSES)


TRAIN, TEST = labelled(40, 0), labelled(20, 1)


def test_all_of_it_gives_the_names_of_the_command_line_as_json():
    config = tiny_config()
    model, space = tiny_model(config)
    steps = []
    found = evaluate_model(
        model, config, space, train=TRAIN, test=TEST, components=True, progress=lambda *at: steps.append(at)
    )
    assert {"mrr", "mrr_chance", "mrr_shuffled", "mrr_neutral", "knn", "knn_untrained"} <= found.keys()
    assert {"linear", "linear_untrained", "h1", "h5", "mrr_cosine", "mrr_only_hue"} <= found.keys()
    assert (found["encoder"], found["pooling"], found["knn_k"]) == ("target", "mean of all tokens", 20)
    assert (found["train_images"], found["test_images"], found["classes"]) == (40, 20, 2)
    assert (found["mrr_images"], found["mrr_queries"], found["mrr_bank"]) == (3, 16, 16)
    assert (found["knn_chance"], found["linear_chance"]) == (0.5, 0.5)
    for key in ("mrr", "mrr_shuffled", "knn", "knn_untrained", "linear"):
        low, high = found[f"{key}_interval"]
        assert low <= found[key] <= high
    assert found["linear"] == 1  # light and dark
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert ("features, train", 40, 40) in steps
    assert ("mrr, hue only", 3, 3) in steps


def test_untrained_is_the_network_as_training_begins_and_leaves_the_random_state_alone():
    config = tiny_config()
    _, space = tiny_model(config)
    torch.manual_seed(config.train.seed)
    begun = type(tiny_model(config)[0])
    torch.manual_seed(config.train.seed)
    begun = begun(config.model, space.dim)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = untrained_model(config, space, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in begun.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    found = evaluate_model(begun, config, space, train=TRAIN, test=TEST, what=("knn", "linear"))
    assert found["knn"] == found["knn_untrained"]
    assert found["linear"] == found["linear_untrained"]


def test_only_requested_evaluations_run():
    config = tiny_config()
    model, space = tiny_model(config)
    found = evaluate_model(model, config, space, train=TRAIN, test=TEST, what=("knn",), untrained=False)
    assert "knn" in found
    assert not {"mrr", "linear", "knn_untrained", "not_run"} & found.keys()
    with pytest.raises(ValueError, match="what has 'fid'"):
        evaluate_model(model, config, space, test=TEST, what=("mrr", "fid"))


def test_the_encoder_is_named_and_can_be_chosen():
    config = tiny_config()
    model, space = tiny_model(config)
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.zero_()
    options = {"train": TRAIN, "test": TEST, "what": ("linear",), "untrained": False}
    average = evaluate_model(model, config, space, **options)
    context = evaluate_model(model, config, space, encoder="context", **options)
    assert (average["encoder"], average["linear"]) == ("target", 0.5)
    assert (context["encoder"], context["linear"]) == ("context", 1)


@pytest.mark.parametrize(
    ("train", "test", "reason"),
    [
        (None, TEST, "no training images"),
        (TensorSplit(TRAIN.images), TensorSplit(TEST.images), "no classes"),
        (TRAIN, TensorSplit(TEST.images, TEST.labels, ("a", "b", "c")), "they differ"),
    ],
    ids=["no train", "no classes", "other classes"],
)
def test_without_classes_the_probes_do_not_run_and_say_so(train, test, reason):
    config = tiny_config()
    model, space = tiny_model(config)
    found = evaluate_model(model, config, space, train=train, test=test, what=names())
    assert "mrr" in found
    assert "knn" not in found
    missing = {"knn", "linear", "attentive", "rollout"} | ({"equivariance"} if train is None else set())
    assert set(found["not_run"]) == missing
    assert reason in found["not_run"]["knn"]


def test_without_jitter_there_is_no_bank_and_it_says_so():
    config = tiny_config()
    model, space = tiny_model(config)
    still = Config(**(dict(config) | {"actions": ActionsConfig(strength=0.0)}))
    found = evaluate_model(model, still, space, train=TRAIN, test=TEST, what=("mrr", "knn"), untrained=False)
    assert "mrr" not in found
    assert "knn" in found
    assert "strength" in found["not_run"]["mrr"]
    assert ranked_examples(model, still, space, TEST.images[:1]) == []


def test_the_attentive_probe_runs_on_request():
    """Dark and light pictures again, by all tokens; the rate is chosen without the test images."""
    config = tiny_config()
    model, space = tiny_model(config)
    found = evaluate_model(model, config, space, train=TRAIN, test=TEST, what=("attentive",))
    assert found["attentive"] == 1
    assert found["attentive_interval"] == [1, 1]
    assert found["attentive_chance"] == 0.5
    assert found["attentive_top5"] is None
    assert 0 < found["attentive_lr"] < 1
    assert "tenth of the training images" in found["attentive_protocol"]
    assert 0.5 <= found["attentive_untrained"] <= 1
    assert (found["train_images"], found["test_images"]) == (40, 20)
    assert "linear" not in found


def test_settings_larger_than_the_set_are_reduced_aloud():
    config = tiny_config()
    model, space = tiny_model(config)
    few = labelled(10, 2)
    found = evaluate_model(model, config, space, train=few, test=labelled(4, 3), what=("mrr", "knn"), images=9)
    assert (found["mrr_images"], found["knn_k"]) == (4, 10)
    assert found["reduced"] == {
        "mrr_images": {"asked": 9, "used": 4, "why": "there are 4 test images"},
        "knn_k": {"asked": 20, "used": 10, "why": "there are 10 training images"},
    }
    assert "reduced" not in evaluate_model(model, config, space, train=TRAIN, test=TEST, what=("mrr", "knn"))


def test_a_probe_without_images_to_hold_out_does_not_run_and_says_so():
    """One training image per class: nothing to choose a weight decay or a learning rate by."""
    config = tiny_config()
    model, space = tiny_model(config)
    one = TensorSplit(TRAIN.images[[0, -1]], TRAIN.labels[[0, -1]], CLASSES)
    found = evaluate_model(model, config, space, train=one, test=TEST, what=("knn", "linear", "attentive"))
    assert "knn" in found
    assert set(found["not_run"]) == {"linear", "attentive"}
    assert "no class has two training images" in found["not_run"]["linear"]
    assert not {"linear", "linear_chance", "attentive"} & found.keys()


def test_components_are_ranked_on_fewer_images_where_asked_and_that_is_reported():
    config = tiny_config()
    model, space = tiny_model(config)
    found = evaluate_model(
        model, config, space, test=TensorSplit(pictures(5)), what=["mrr"], untrained=False, images=4, queries=2,
        components=True, component_images=2,
    )  # fmt: skip
    assert found["mrr_images"] == 4
    entry = found["reduced"]["mrr_component_images"]
    assert (entry["asked"], entry["used"]) == (4, 2)
    assert "--full" in entry["why"]
