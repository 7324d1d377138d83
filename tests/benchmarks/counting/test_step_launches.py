"""Launches of a step by part, without a GPU."""

from __future__ import annotations

import json

import pytest
from second_term import WITH_VARIANCE

from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.benchmarks.counting.step_launches import step_launches
from iwm_fast.benchmarks.launches import main
from iwm_fast.cost.memory import layout_of
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.errors import UserError
from iwm_fast.models import objective

DEPTH, PREDICTOR_DEPTH = 12, 6  # of cpu-tiny
SMALL = ("train.global_batch=8", "train.precision=bf16", "zero.stage=0")


def counted(*overrides, preset="cpu-tiny", optimizer=False):
    if optimizer:
        start(alone=True)
    rows = step_launches(preset_config(preset, (*SMALL, *overrides)), optimizer=optimizer)
    return {row.part: row.triton + row.torch for row in rows}


@pytest.fixture(scope="module")
def whole_step():
    return counted(optimizer=True)


def of_mlps(rows):
    return sum(row.triton + row.torch for row in rows if row.part.endswith("/mlp"))


@pytest.mark.parametrize(("preset", "most"), [("gpu-base", 750), ("gpu-small", 560)])
def test_the_mlps_of_a_step_launch_few_kernels(preset, most):
    """The target's forward pass, and forward and backward of context encoder and predictor, for 256 images."""
    config = preset_config(preset, ("train.global_batch=256", "train.micro_batch=256", "zero.stage=0"))
    rows = step_launches(config, optimizer=False)
    assert {row.part for row in rows if row.part.endswith("/mlp")} == {
        "forward/target encoder/mlp",
        "forward/context encoder/mlp",
        "forward/predictor/mlp",
        "backward/context encoder/mlp",
        "backward/predictor/mlp",
    }
    assert of_mlps(rows) <= most


def test_each_block_s_launches_are_its_component_s():
    found = counted()
    assert found["forward/context encoder/mlp"] == found["forward/target encoder/mlp"] == 3 * DEPTH
    assert found["backward/context encoder/mlp"] == 9 * DEPTH
    assert found["forward/context encoder/norms"] == DEPTH + 1
    assert found["forward/context encoder/attention"] == 3 * DEPTH  # qkv, attention, proj
    assert found["backward/context encoder/norms"] == 2 * DEPTH + 2
    assert found["forward/predictor/attention"] == 3 * PREDICTOR_DEPTH
    assert not [part for part in found if part.startswith("backward/target encoder")]


@pytest.mark.parametrize(
    ("changes", "launches"),
    [
        ((), 6),  # its four, and two that unbatch the gradients of q, k and v and copy them into one tensor
        (("model.attention=efficient",), 2),
        (("train.precision=fp32",), 5),
    ],
    ids=["flash", "efficient", "efficient in fp32"],
)
def test_attention_launches_what_the_null_gpu_counted(changes, launches):
    """Backward, in addition to three for each of the two linear layers."""
    assert counted(*changes)["backward/context encoder/attention"] == (6 + launches) * DEPTH


def test_an_action_in_the_blocks_adds_its_launches():
    """A block computes each token's image in the forward pass, and has four more launches in the backward pass."""
    found = counted("model.predictor.conditioning=block")
    assert found["forward/predictor/mlp"] == 4 * PREDICTOR_DEPTH
    assert found["backward/predictor/mlp"] == 13 * PREDICTOR_DEPTH


def test_micro_batches_multiply_the_model_s_launches_and_not_the_optimizer_s(whole_step):
    once, twice = whole_step, counted("train.micro_batch=4", optimizer=True)
    for part in ("forward/context encoder/mlp", "backward/predictor/attention", "forward/loss"):
        assert twice[part] == 2 * once[part], part
    assert {part: n for part, n in twice.items() if part.startswith("optimizer")} == {
        part: n for part, n in once.items() if part.startswith("optimizer")
    }
    assert once["ema"] == twice["ema"] == 1
    gradients = len(layout_of(preset_config("cpu-tiny")).trained)  # the second micro-batch's are added to the first's
    assert twice["backward/gradients"] == once["backward/gradients"] + gradients


def test_recomputation_is_the_backward_pass_s_and_its_component_s():
    plain = counted("zero.stage=1")
    again = counted("zero.stage=1", "train.activation_checkpointing=true")
    for component in ("context encoder", "predictor"):
        part = f"{component}/norms"
        assert again[f"forward/{part}"] == plain[f"forward/{part}"]
        assert again[f"backward/{part}"] > plain[f"backward/{part}"]


def test_a_shared_encoder_counts_as_the_target_where_it_is_not_differentiated():
    found = counted("model.target=shared")
    assert found["forward/target encoder/mlp"] == found["forward/context encoder/mlp"] == 3 * DEPTH
    assert "backward/target encoder/mlp" not in found


def test_a_frozen_encoder_counts_as_context_and_target_and_has_no_backward_pass():
    found = counted("model.target=shared", "model.freeze_encoder=true", "model.init=w")
    assert found["forward/target encoder/mlp"] == found["forward/context encoder/mlp"] == 3 * DEPTH
    assert not [part for part in found if part.startswith("backward/context encoder")]
    assert found["backward/predictor/mlp"] > 0


@pytest.mark.slow
def test_deepspeed_s_own_launches_are_apart_from_the_update_s(whole_step):
    stage_1 = counted("zero.stage=1", optimizer=True)
    assert stage_1["optimizer/finite check"] > 0
    assert stage_1["optimizer/AdamW"] > 0
    assert stage_1["optimizer/DeepSpeed"] > 0
    assert stage_1["backward/DeepSpeed"] > 0
    assert "forward/bf16 weights" not in stage_1
    assert whole_step["optimizer/AdamW"] > 0
    assert "optimizer/DeepSpeed" not in whole_step
    assert "forward/bf16 weights" in whole_step


@pytest.mark.parametrize(
    "setting",
    [
        "zero.stage=3",
        "train.compile=true",
        "train.deterministic=true",
        "model.attention=sdpa",
        "model.attention=cudnn",
    ],
)
def test_what_is_not_counted_is_refused_by_its_name(setting):
    with pytest.raises(UserError, match=setting):
        counted(setting)


def test_the_program_writes_each_part_and_the_total(tmp_path, capsys):
    main(["cpu-tiny", *SMALL, "--json", str(tmp_path / "found.json")])
    document = json.loads((tmp_path / "found.json").read_text())
    assert {"part", "triton", "torch"} == document["rows"][0].keys()
    assert document["total"] == sum(row["triton"] + row["torch"] for row in document["rows"])
    parts = [row["part"] for row in document["rows"]]
    assert len(parts) == len(set(parts))
    for part in ("forward/patch embedding", "forward/loss", "optimizer/gradient norm", "optimizer/AdamW", "ema"):
        assert part in parts
    assert str(document["total"]) in capsys.readouterr().out


def test_several_configurations_are_counted_in_one_call(tmp_path, capsys):
    words = (*SMALL, "views.sources_per_target=2")
    main(["cpu-tiny", "cpu-micro", *words, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["configs"]
    assert [one["config"] for one in found] == ["cpu-tiny", "cpu-micro"]
    assert [(one["images"], one["sources_per_target"]) for one in found] == [(8, 2)] * 2
    assert "cpu-micro, images: 8 × 2 sources, stage 0" in capsys.readouterr().out
    assert all(one["total"] == sum(row["triton"] + row["torch"] for row in one["rows"]) for one in found)


@pytest.mark.parametrize(
    "words",
    [[], ["train.global_batch=8"], ["nowhere.yaml"], ["cpu-tiny", "--mlp", "1,2,3,4"]],
)
def test_anything_but_one_configuration_is_refused(words):
    with pytest.raises(UserError):
        main([*words, "--json", "-"])


def test_a_second_term_of_the_loss_counts_as_loss_and_one_has_its_kernel_s_launches(monkeypatch):
    """Stop-gradient L2: the sums and their total, and the gradient, which is recomputed for an upstream one."""
    one = counted()
    assert (one["forward/loss"], one["backward/loss"]) == (2, 2)
    monkeypatch.setattr(objective, "TERMS", WITH_VARIANCE)
    two = counted()
    assert two["forward/loss"] > one["forward/loss"] + 5
    assert two["backward/loss"] > one["backward/loss"] + 5
    assert two["backward/context encoder/mlp"] == one["backward/context encoder/mlp"]
