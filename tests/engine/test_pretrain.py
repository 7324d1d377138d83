"""Whole runs on one rank: what a run writes, and that stopping and resuming changes nothing."""

import json

import pytest
import torch
from small_run import losses, metrics, small_config, state

from iwm_fast.engine import load_model, pretrain, train
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.engine.ema import TargetAverage, target_name
from iwm_fast.errors import UserError
from iwm_fast.eval.online import OnlineEvaluator, join_shares, measure_share

ALSO_0 = pytest.param(0, marks=pytest.mark.slow)
STAGES = [ALSO_0, 1, pytest.param(2, marks=pytest.mark.slow), 3]


@pytest.mark.parametrize("stage", STAGES)
def test_ten_and_ten_steps_equal_twenty_bit_for_bit(tiny_images, tmp_path, stage, capfd):
    config = small_config(tiny_images, zero__stage=stage)
    pretrain(config, tmp_path / "straight")
    pretrain(small_config(tiny_images, zero__stage=stage, train__steps=10), tmp_path / "halves")
    pretrain(config, tmp_path / "halves", resume="auto")
    assert "the next step is 11 of 20" in capfd.readouterr().err
    assert [r["step"] for r in metrics(tmp_path / "halves")] == list(range(1, 21))
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    straight, halves = state(tmp_path / "straight", 20), state(tmp_path / "halves", 20)
    assert straight.keys() == halves.keys()
    assert all(torch.equal(straight[key], halves[key]) for key in straight)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_follow_the_undivided_trajectory(tiny_images, tmp_path, stage):
    pretrain(small_config(tiny_images, train__steps=8), tmp_path / "plain")
    pretrain(small_config(tiny_images, train__steps=8, zero__stage=stage), tmp_path / "divided")
    assert losses(tmp_path / "divided") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_does_not_change_losses_or_gradients(tiny_images, tmp_path, stage):
    pretrain(small_config(tiny_images, train__steps=5, zero__stage=stage), tmp_path / "whole")
    pretrain(small_config(tiny_images, train__steps=5, train__micro_batch=3, zero__stage=stage), tmp_path / "parts")
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in parts] == pytest.approx([r[key] for r in whole], rel=1e-4)


def test_several_sources_train_alike_however_the_batch_is_divided(tiny_images, tmp_path):
    several = {"train__steps": 4, "views__sources_per_target": 3}
    pretrain(small_config(tiny_images, **several), tmp_path / "whole")
    pretrain(small_config(tiny_images, train__micro_batch=2, **several), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert len(set(losses(tmp_path / "whole"))) == 4


@pytest.mark.slow
def test_a_checkpoint_of_one_stage_resumes_as_another(tiny_images, tmp_path):
    pretrain(small_config(tiny_images), tmp_path / "straight")
    for first, then in ((0, 3), (3, 2), (1, 0)):
        run = tmp_path / f"from{first}to{then}"
        pretrain(small_config(tiny_images, train__steps=10, zero__stage=first), run)
        pretrain(small_config(tiny_images, zero__stage=then), run, resume="auto")
        assert losses(run) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_and_keeps_fp32_weights(tiny_images, tmp_path, stage):
    pretrain(small_config(tiny_images, train__steps=8), tmp_path / "fp32")
    pretrain(small_config(tiny_images, train__steps=8, train__precision="bf16", zero__stage=stage), tmp_path / "bf16")
    # bf16 has 8 bits of mantissa: one rounding is 0.4 %, and a loss with a few dozen of them in sequence is within 5 %.
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)
    weights = state(tmp_path / "bf16", 8)
    assert any(not torch.equal(w, w.bfloat16().float()) for key, w in weights.items() if key.startswith("weight/"))


@pytest.mark.parametrize("stage", [ALSO_0, 1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_target_in_fp8_follows_the_one_without(tiny_images, tmp_path, stage, precision, capfd):
    """Its operands are off by 2.6 % each, its features by about 4 %, and a loss of their size by no more."""
    same = {"train__steps": 8, "zero__stage": stage, "train__precision": precision}
    pretrain(small_config(tiny_images, **same), tmp_path / "plain")
    assert "fp8" not in capfd.readouterr().err
    pretrain(small_config(tiny_images, **same, model__target_precision="fp8"), tmp_path / "fp8")
    assert f"{precision}, target in fp8" in capfd.readouterr().err
    found, expected = losses(tmp_path / "fp8"), losses(tmp_path / "plain")
    assert found == pytest.approx(expected, rel=0.05)
    assert all(one != other for one, other in zip(found, expected, strict=True))
    assert state(tmp_path / "fp8", 8).keys() == state(tmp_path / "plain", 8).keys()


def test_the_ema_moves_under_bf16_at_a_momentum_close_to_one(tiny_images, tmp_path):
    """In bf16 a step of 4e-4 of the difference would round to nothing: the EMA must be fp32."""
    config = small_config(
        tiny_images, train__steps=4, train__precision="bf16", train__ema=[0.9996, 0.9996], zero__stage=1
    )
    pretrain(config, tmp_path / "run")
    after = state(tmp_path / "run", 4)
    moved = [
        (after[key] - after[key.replace("ema/target_encoder.", "weight/encoder.")]).abs().max() for key in after
        if key.startswith("ema/") and key.endswith("mlp.w_in")
    ]  # fmt: skip
    first = small_config(
        tiny_images, train__steps=1, train__precision="bf16", train__ema=[0.9996, 0.9996], zero__stage=1
    )
    pretrain(first, tmp_path / "first")
    start = state(tmp_path / "first", 1)
    assert all(m > 0 for m in moved)
    assert any(not torch.equal(start[key], after[key]) for key in after if key.startswith("ema/"))


def test_the_ema_equals_float64(tiny_images, tmp_path):
    """EMAs of consecutive checkpoints' weights, recomputed in float64."""
    config = small_config(
        tiny_images, train__steps=4, checkpoint__every_steps=1, checkpoint__keep_last=9, zero__stage=2
    )
    pretrain(config, tmp_path / "run")
    steps = [state(tmp_path / "run", s) for s in (1, 2, 3, 4)]
    momenta = [r["ema_momentum"] for r in metrics(tmp_path / "run")]
    for key in [k for k in steps[0] if k.startswith("ema/")]:
        expected = steps[0][key].double()
        for momentum, at in zip(momenta[1:], steps[1:], strict=True):
            expected = momentum * expected + (1 - momentum) * at[key.replace("ema/target_encoder.", "weight/encoder.")]
        torch.testing.assert_close(steps[3][key].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_target_of_a_single_rank_reads_the_rounded_ema(tiny_images, tmp_path, stage, precision, monkeypatch):
    """After each update, and after a resume, which sets the EMA and refreshes its rounded copy."""
    seen = []

    class Watched(TargetAverage):
        def update(self, momentum, unless=None):
            super().update(momentum, unless)
            seen.append(self.reads_what_it_should())

        def refresh(self):
            super().refresh()
            seen.append(self.reads_what_it_should())

        def reads_what_it_should(self):
            for shard, average in zip(self.shards, self.averages, strict=True):
                parameter = self._targets[target_name(shard.name)]
                read = getattr(parameter, "ds_tensor", parameter).data.flatten()
                if not torch.equal(read, average.to(read.dtype)):
                    return False
            return True

    monkeypatch.setattr(train, "TargetAverage", Watched)
    changes = {"train__precision": precision, "zero__stage": stage, "checkpoint__every_steps": 2}
    pretrain(small_config(tiny_images, train__steps=2, **changes), tmp_path / "run")
    pretrain(small_config(tiny_images, train__steps=3, **changes), tmp_path / "run", "auto")
    assert seen == [True] * 4


def test_a_run_says_what_it_is_and_logs_what_is_promised(tiny_images, tmp_path):
    pretrain(small_config(tiny_images, train__steps=3, log__tensorboard=True), tmp_path / "run")
    assert (tmp_path / "run/config.yaml").exists()
    assert json.loads((tmp_path / "run/environment.json").read_text())["environment"]["packages"]["torch"]
    assert list((tmp_path / "run/tensorboard").iterdir())
    promised = {
        "step", "epoch", "samples_seen", "loss", "lr", "weight_decay", "ema_momentum", "grad_norm", "images_per_s",
        "data_wait_s", "step_s", "mfu", "memory_bytes", "rank_me", "bad_samples",
    }  # fmt: skip
    for record in metrics(tmp_path / "run"):
        assert promised <= record.keys()
    assert metrics(tmp_path / "run")[2]["samples_seen"] == 24


def test_a_run_with_checkpoints_is_not_overwritten(tiny_images, tmp_path):
    config = small_config(tiny_images, train__steps=1)
    pretrain(config, tmp_path / "run")
    with pytest.raises(UserError, match="--resume auto"):
        pretrain(config, tmp_path / "run")


def test_auto_on_an_empty_run_starts_anew(tiny_images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')  # of a launch killed before a checkpoint
    pretrain(small_config(tiny_images, train__steps=1), tmp_path / "run", resume="auto")
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1]
    assert losses(tmp_path / "run") != [5.0]


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputed_activations_change_nothing(tiny_images, tmp_path, stage):
    plain = small_config(tiny_images, train__steps=5, zero__stage=stage)
    recomputed = small_config(tiny_images, train__steps=5, zero__stage=stage, train__activation_checkpointing=True)
    pretrain(plain, tmp_path / "plain")
    pretrain(recomputed, tmp_path / "recomputed")
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_the_geometric_group_trains_resumes_and_is_recorded(tiny_images, tmp_path):
    groups = {"actions__groups": ["photometric", "geometric"], "checkpoint__every_steps": 3}
    pretrain(small_config(tiny_images, train__steps=6, **groups), tmp_path / "straight")
    pretrain(small_config(tiny_images, train__steps=3, **groups), tmp_path / "halves")
    pretrain(small_config(tiny_images, train__steps=6, **groups), tmp_path / "halves", resume="auto")
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    names = Checkpoint(tmp_path / "straight/checkpoints/step_000006").index["action_names"]
    assert {"crop_x", "flip", "rotation_3"} <= set(names)


def test_a_run_that_is_done_says_so_and_stays_as_it_is(tiny_images, tmp_path, capfd):
    config = small_config(tiny_images, train__steps=2)
    pretrain(config, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    pretrain(config, tmp_path / "run", resume="auto")
    assert "nothing to do: 2 steps are done" in capfd.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_another_architecture_is_refused_in_one_line(tiny_images, tmp_path):
    pretrain(small_config(tiny_images, train__steps=1), tmp_path / "run")
    wider = small_config(tiny_images, model__predictor={"depth": 1, "width": 32, "heads": 2})
    with pytest.raises(UserError, match="another architecture") as caught:
        pretrain(wider, tmp_path / "other", resume=str(tmp_path / "run/checkpoints/step_000001"))
    assert "\n" not in str(caught.value)


def test_non_finite_gradients_skip_the_step_and_end_the_run_after_the_limit(tiny_images, tmp_path):
    config = small_config(tiny_images, train__lr=1e30, train__warmup=0, train__max_skipped=2, train__lr_start=1.0)
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        pretrain(config, tmp_path / "run")


@pytest.mark.parametrize("predictor", [{"kind": "mlp", "conditioning": "block"}, {"conditioning": "sequence+block"}])
def test_other_predictors_and_the_shared_target_train_too(tiny_images, tmp_path, predictor):
    shape = {"depth": 2, "width": 32, "heads": 2}
    config = small_config(tiny_images, train__steps=6, model__target="shared", model__predictor=shape | predictor)
    pretrain(config, tmp_path / "run")
    assert all(loss > 0 for loss in losses(tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["ema_momentum"] is None


@pytest.mark.parametrize("stage", [ALSO_0, 1, 3])
def test_evaluation_while_training_measures_the_live_model_and_changes_nothing(tiny_images, tmp_path, stage):
    measured = {"eval__every_steps": 2, "eval__root": str(tiny_images), "eval__mrr_images": 2, "eval__bank": 8}
    config = small_config(tiny_images, train__steps=4, zero__stage=stage, **measured)
    pretrain(config, tmp_path / "with", evaluator=OnlineEvaluator())
    pretrain(small_config(tiny_images, train__steps=4, zero__stage=stage), tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    records = metrics(tmp_path / "with")
    assert [r["step"] for r in records if "mrr" in r] == [2, 4]
    model, config, space, _ = load_model(tmp_path / "with")
    again = join_shares([measure_share(model, config, space, tiny_images)], config.eval.bank)
    assert {key: records[3][key] for key in again} == pytest.approx(again)
