"""A new run that starts from weights: what it loads, at every stage, what it records, and that a resume reads none."""

import json
import shutil

import pytest
import torch
from launched import on_ranks
from made_weights import timm_state
from safetensors.torch import load_file, save_file
from small_run import losses, small_config, state

from iwm_fast.engine import load_model, pretrain
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.errors import UserError
from iwm_fast.export.weights import export_run
from iwm_fast.families import read_weights, recognise
from iwm_fast.models.iwm import IWM


@pytest.fixture(scope="module")
def teacher(tiny_images, tmp_path_factory):
    """A run whose EMA lags far behind its encoder."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    pretrain(small_config(tiny_images, train__steps=3, train__lr=0.05, train__ema=[0.9, 0.9]), out)
    model, *_ = load_model(out)
    pairs = zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True)
    assert any((a - b).abs().max() > 1e-3 for a, b in pairs)
    return out


# One step that moves nothing: its checkpoint holds the weights that the run started from.
STILL = {"train__steps": 1, "train__lr": 1e-30, "train__ema": [1.0, 1.0]}


def started(out, teacher):
    """The parts of a run's first checkpoint that are not the teacher's weights: "weight/encoder", ..."""
    found, taught = state(out, 1), state(teacher, 3)
    kinds = [key for key in taught if key.startswith(("weight/", "ema/"))]
    return {key.split(".")[0] for key in kinds if key not in found or not torch.equal(found[key], taught[key])}


EVERY_STAGE = [pytest.param(stage, marks=() if stage == 1 else pytest.mark.slow) for stage in range(4)]


@pytest.mark.parametrize("stage", EVERY_STAGE)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_encoder_ema_and_predictor_start_exactly_as_the_file_has_them(teacher, tiny_images, tmp_path, stage, precision):
    """At stages with bf16 copies too: the fp32 weights are the file's."""
    given = {"model__init": str(teacher), "model__init_predictor": str(teacher), "zero__stage": stage}
    config = small_config(tiny_images, **STILL, train__precision=precision, train__seed=9, **given)
    pretrain(config, tmp_path / "run")
    assert started(tmp_path / "run", teacher) == set()


@pytest.mark.slow
def test_two_ranks_start_as_one_at_every_stage(teacher, tiny_images, tmp_path):
    given = {"model__init": str(teacher), "model__init_predictor": str(teacher), "train__steps": 4, "train__seed": 9}
    pretrain(small_config(tiny_images, **given), tmp_path / "one")
    jobs = [{"name": f"two_{stage}", "zero__stage": stage, **given} for stage in range(4)]
    jobs += [{"name": f"still_{stage}", "zero__stage": stage, **given, **STILL} for stage in range(4)]
    on_ranks(2, tiny_images, tmp_path, jobs)
    for stage in range(4):
        assert losses(tmp_path / f"two_{stage}") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        assert started(tmp_path / f"still_{stage}", teacher) == set()


def test_a_run_without_the_ema_of_a_file_starts_it_as_the_encoder(teacher, tiny_images, tmp_path):
    exported = export_run(teacher, tmp_path / "export")
    config = small_config(tiny_images, **STILL, model__init=str(exported / "context_encoder_timm.safetensors"))
    pretrain(config, tmp_path / "run")
    found, taught = state(tmp_path / "run", 1), state(teacher, 3)
    for key, tensor in taught.items():
        if key.startswith("weight/encoder."):
            assert torch.equal(found[key], tensor), key
            assert torch.equal(found[key.replace("weight/encoder.", "ema/target_encoder.")], tensor), key


def test_the_run_records_what_it_started_from_and_says_it_in_a_line(teacher, tiny_images, tmp_path, capsys):
    given = {
        "model__init": str(teacher),
        "model__predictor__conditioning": "block",
        "model__init_predictor": str(teacher),
    }
    pretrain(small_config(tiny_images, train__steps=1, **given), tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model.init")]
    kept = "blocks.*.mlp.w_action of the conditioning start as usual, the file has none that fit"
    predictor = f"predictor of run of iwm-fast, step_000003; {kept}; left out: feature (7 tensors)"
    assert lines == [
        f"model.init: {teacher}: run of iwm-fast, step_000003; the EMA starts from its target encoder",
        f"model.init_predictor: {teacher}: {predictor}",
    ]
    record = json.loads((tmp_path / "run" / "initial_weights.json").read_text())
    assert record["schema"] == "iwm-fast-initial-weights/1"
    init = record["init"]
    assert init["path"] == str(teacher)
    assert init["files"].keys() == {"manifest.json"}
    assert init["target_encoder"] is True
    assert init["architecture"]["shape"] == {"depth": 2, "width": 32, "heads": 2, "mlp_ratio": 4.0}
    assert record["init_predictor"]["initialised"] == [f"blocks.{i}.mlp.w_action" for i in range(2)]


def test_a_resumed_run_reads_no_weights_and_one_from_another_s_checkpoint_has_its_record(
    teacher, tiny_images, tmp_path
):
    own = shutil.copytree(teacher, tmp_path / "own")
    given = {"model__init": str(own), "model__init_predictor": str(own)}
    pretrain(small_config(tiny_images, train__steps=2, **given), tmp_path / "run")
    shutil.rmtree(own)
    pretrain(small_config(tiny_images, train__steps=3, **given), tmp_path / "run", resume="auto")
    pretrain(small_config(tiny_images, train__steps=3, **given), tmp_path / "other", resume=str(tmp_path / "run"))
    assert Checkpoint(tmp_path / "run/checkpoints/step_000003").step == 3
    records = [(tmp_path / run / "initial_weights.json").read_bytes() for run in ("run", "other")]
    assert records[0] == records[1]
    with pytest.raises(UserError, match=r"model\.init: .*own: no such file or folder"):
        pretrain(small_config(tiny_images, train__steps=2, **given), tmp_path / "new")


def test_a_run_at_another_size_resamples_patches_of_its_own(teacher, tiny_images, tmp_path):
    pretrain(small_config(tiny_images, **STILL, model__init=str(teacher), model__patch=16), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "initial_weights.json").read_text())
    assert record["init"]["resized"] == ["patch embedding resampled from 8 to 16 pixels (pseudo-inverse)"]
    assert load_model(tmp_path / "run")[0].encoder.patch_embed.proj.weight.shape == (32, 3, 16, 16)


FAULTS = {
    "a missing path": ({"model__init": "gone"}, r"^model\.init: gone: no such file or folder"),
    "another width": (
        {"model__init": "RUN", "model__encoder": {"depth": 2, "width": 48, "heads": 3}},
        r"^model\.init: .*run: norm\.weight is 32 there and 48 in the configuration: set 'model\.encoder=\{depth",
    ),
    "another predictor": (
        {"model__init_predictor": "RUN", "model__predictor__depth": 3, "model__predictor__width": 64},
        r"has width 32, and the configuration's 64: set model\.predictor\.width=32 model\.predictor\.depth=2$",
    ),
    "another encoder for the predictor": (
        {"model__init_predictor": "RUN", "model__encoder": {"depth": 2, "width": 48, "heads": 3}},
        r"its predictor reads tokens of width 32, and the encoder's have 48; choose a predictor that was trained with",
    ),
    "a file without a predictor": (
        {"model__init_predictor": "FILE"},
        r"has no predictor; name a run, an export, or a rel",
    ),
    "a weight that is no number": (
        {"model__init": "NAN"},
        r"^model\.init: .*: norm\.bias has numbers that are not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_cannot_be_used_are_one_line_before_a_checkpoint(teacher, tiny_images, tmp_path, fault):
    given, line = FAULTS[fault]
    file = export_run(teacher, tmp_path / "export") / "context_encoder_timm.safetensors"
    weights = load_file(file)
    weights["norm.bias"][3] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    places = {"RUN": str(teacher), "FILE": str(file), "NAN": str(tmp_path / "nan.safetensors")}
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(UserError, match=line) as caught:
        pretrain(small_config(tiny_images, train__steps=1, **given), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_file_of_another_library_is_a_frozen_target_and_starts_an_encoder_of_another_architecture(
    teacher, tiny_images, tmp_path
):
    """The target has a class token and learned positions; the encoder, of a run, has neither."""
    save_file(timm_state(tokens=1), tmp_path / "w.safetensors")
    shape = {"depth": 2, "width": 32, "heads": 2, "mlp_ratio": 2.0}
    config = small_config(
        tiny_images, **STILL, model__init=str(teacher), model__target="frozen",
        model__target_init=str(tmp_path / "w.safetensors"),
        model__target_encoder={"encoder": shape, "prefix_tokens": 1, "positions": "learned"},
    )  # fmt: skip
    pretrain(config, tmp_path / "run")
    assert {place for place in started(tmp_path / "run", teacher) if "ema" not in place} == {"weight/predictor"}
    model, *_ = load_model(tmp_path / "run")
    given = recognise(read_weights(tmp_path / "w.safetensors")).encoder
    found = model.target_encoder.state_dict()
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in found)


def test_the_configuration_and_the_plan_read_no_weights(tiny_images, tmp_path):
    """A model for evaluation, a plan or a resume is built without the files."""
    config = small_config(tiny_images, model__init="gone", model__init_predictor="gone")
    assert isinstance(IWM(config.model, 7), IWM)
