"""Each family's features by our encoder equal those of its own implementation, with random weights, at every size.

The references are timm and transformers, in a process of their own (tests/reference_models.py); weights under their
authors' names are compared with timm, which loads them too.
"""

import json

import pytest
import torch
from reference_features import FAMILIES, FULL, HEADS, TOLERANCE, require_equal, weights_of
from reference_libraries import build_references
from small_run import small_config, state

from iwm_fast.config import PredictorConfig
from iwm_fast.engine import pretrain
from iwm_fast.families import predictor_of, read_weights, recognise
from iwm_fast.models.packing import Segments
from iwm_fast.models.predictors import VitPredictor


@pytest.mark.parametrize("name", FAMILIES)
def test_features_equal_the_family_s_own_at_its_size_and_others(references, name):
    assert recognise(read_weights(weights_of(references / name))).family == FAMILIES[name]
    settings = require_equal(references / name)
    own_only = name in ("own_dinov2", "own_ijepa", "own_mae")  # timm interpolates these by another rule
    assert settings == (
        ["own"] if own_only else ["other", "own", "patch"] if name.startswith("timm") else ["other", "own"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_features_of_released_sizes_equal_timm_s(tmp_path, name):
    assert require_equal(build_references(tmp_path, name) / name) == ["other", "own"]


def test_names_of_transformers_5_are_read_as_those_of_its_files(references):
    """A state_dict in memory has other names than its file, which config.json does not tell apart."""
    from iwm_fast.families import Contents, LazyTensors

    given = read_weights(references / "hf_vit" / "weights")
    renamed = {}
    for name in given.tensors:
        new = name.replace("encoder.layer.", "layers.").replace("attention.attention.", "attention.")
        for old, now in {
            "query": "q_proj", "key": "k_proj", "value": "v_proj", "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        }.items():  # fmt: skip
            new = new.replace(old, now)
        renamed[f"vit.{new}"] = name
    tensors = LazyTensors({new: lambda old=old: given.tensors[old] for new, old in renamed.items()})
    found = recognise(Contents("w", tensors, (), given.config))
    plain = recognise(given)
    assert found.encoder.keys() == plain.encoder.keys()
    assert all(torch.equal(found.encoder[name], plain.encoder[name]) for name in plain.encoder)


def test_i_jepa_s_predictor_predicts_as_its_formula(references, plain):
    """A second implementation in float64, without actions; its state has the file's own names."""
    place = weights_of(references / "own_ijepa")
    found = predictor_of(read_weights(place))
    assert found is not None
    weights = found[0]
    about = (weights.width, weights.depth, weights.hidden, weights.encoder_width, weights.heads)
    assert about == (32, 2, 128, 32, None)
    config = PredictorConfig(depth=2, width=32, heads=HEADS, conditioning="none")
    ours = VitPredictor(config, 32, 4, 3).eval()
    ours.load_state_dict(dict(weights.tensors))
    released = torch.load(place, weights_only=True)["predictor"]
    state = {
        name.removeprefix("module.").removeprefix("predictor_"): value.double() for name, value in released.items()
    }
    state["mask_token"] = state["mask_token"].flatten()
    z, context, predicted = torch.randn(9, 32), list(range(9)), [9, 12, 15]
    want = plain.predictor(state, z.double(), context, predicted, torch.zeros(3).double(), HEADS, 4)
    lengths = [Segments.from_lengths([len(part)]) for part in (context, predicted)]
    with torch.no_grad():
        got = ours(z, torch.tensor(context), lengths[0], torch.tensor(predicted), lengths[1], torch.zeros(1, 3))
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_a_released_i_jepa_starts_encoder_ema_and_predictor(references, tiny_images, tmp_path):
    """Of the predictor all but the conditioning; one step at a rate of nothing shows what the run started from."""
    place = str(weights_of(references / "own_ijepa"))
    config = small_config(
        tiny_images, train__steps=1, train__lr=1e-30, train__ema=[1.0, 1.0], model__init=place,
        model__init_predictor=place,
    )  # fmt: skip
    pretrain(config, tmp_path / "run")
    released = torch.load(place, weights_only=True)
    saved = state(tmp_path / "run", 1)
    for kind, part in {"weight/encoder": "encoder", "ema/target_encoder": "target_encoder"}.items():
        assert torch.equal(saved[f"{kind}.blocks.1.mlp.w_in"], released[part]["module.blocks.1.mlp.fc1.weight"])
    for name in ("proj.weight", "norm.bias", "blocks.1.attn.qkv.bias"):
        assert torch.equal(saved[f"weight/predictor.{name}"], released["predictor"][f"module.predictor_{name}"])
    record = json.loads((tmp_path / "run" / "initial_weights.json").read_text())["init_predictor"]
    assert {name.split(".")[0] for name in record["initialised"]} == {"feature"}
    assert record["family"] == "I-JEPA"
