"""What a run hands on: the model that was trained, in files that others read."""

import json

import pytest
import torch
from safetensors.torch import load_file
from small_run import small_config, state

from iwm_fast.engine import export_run, load_model, pretrain
from iwm_fast.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    pretrain(small_config(tiny_images, train__steps=3, zero__stage=3), out)
    return out


def test_the_loaded_model_has_the_checkpoint_s_weights_and_the_average_as_its_target(run):
    model, _, space, step = load_model(run)
    saved = state(run, 3)
    assert (step, space.dim) == (3, model.action_dim)
    for name, parameter in model.named_parameters():
        kind = "ema" if name.startswith("target_encoder.") else "weight"
        assert torch.equal(parameter, saved[f"{kind}/{name}"])
    assert not model.training


def test_the_export_loads_by_itself_and_computes_the_same(run, tmp_path):
    written = export_run(run, tmp_path / "weights")
    model, *_ = load_model(run)
    described = json.loads((written / "config.json").read_text())
    assert described["schema"] == "iwm-fast-export/1"
    for part in ("encoder", "target_encoder", "predictor"):
        ours = getattr(model, part).state_dict()
        theirs = load_file(written / f"{part}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    timm = load_file(written / "encoder_timm.safetensors")
    assert torch.equal(timm["blocks.0.mlp.fc1.weight"], model.target_encoder.blocks[0].mlp.w_in)
    assert timm["pos_embed"].shape == (1, 16, 32)


def test_an_existing_folder_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_run(run, tmp_path / "there")
    with pytest.raises(UserError, match="not a run"):
        export_run(tmp_path / "there", tmp_path / "out")


def test_a_checkpoint_that_is_not_there_is_named(run):
    with pytest.raises(UserError, match="step_000099"):
        load_model(run, "step_000099")
