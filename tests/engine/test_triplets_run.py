"""A whole run on triplets: trained, resumed, evaluated and exported, with its actions."""

from __future__ import annotations

import html
import json
import shutil

import pytest
import torch
from made_triplets import HEADER, rows_of_manifest, write_game, write_lines
from safetensors.torch import load_file
from small_run import losses, metrics, small_config, state

from iwm_fast.cli.main import main
from iwm_fast.engine import load_model, pretrain
from iwm_fast.errors import UserError
from iwm_fast.eval.online import OnlineEvaluator
from iwm_fast.eval.run import evaluate_run
from iwm_fast.export.weights import export_run

EXTERNAL = {"actions__groups": ["external"], "eval": {"bank": 8, "horizon": 3}}


def config_of(root, **changes):
    return small_config(root, **(EXTERNAL | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train six steps on a game whose folder is deleted afterwards."""
    folder = tmp_path_factory.mktemp("run")
    write_game(folder / "game")
    monitor = {"bank": 8, "horizon": 3, "every_steps": 3, "root": str(folder / "game")}
    config = config_of(folder / "game", train__steps=6, eval=monitor)
    pretrain(config, folder / "run", evaluator=OnlineEvaluator())
    shutil.rmtree(folder / "game")
    return folder / "run"


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    return write_game(tmp_path_factory.mktemp("test_set"), episodes=3, steps=5)


def test_the_loss_falls_and_is_measured_on_the_way(run):
    logged = [record for record in metrics(run) if "loss" in record]
    assert logged[-1]["loss"] < logged[0]["loss"]
    measured = [record for record in metrics(run) if "mrr" in record]
    assert [record["step"] for record in measured] == [3, 6]
    assert all(0 < record["mrr_shuffled"] <= 1 for record in measured)


def test_the_run_knows_its_actions_without_the_manifest(run):
    model, config, space, _ = load_model(run)
    assert model.action_dim == space.dim == 2
    assert space.names == ("push", "turn")
    assert config.actions.external.low == (-2.0, 0.0)
    saved = json.loads((run / "checkpoints" / "step_000006" / "index.json").read_text())
    assert saved["action_names"] == ["push", "turn"]


def test_an_export_names_and_scales_them(run, tmp_path):
    written = export_run(run, tmp_path / "weights")
    described = json.loads((written / "config.json").read_text())["actions"]
    assert described["names"] == ["push", "turn"]
    assert described["external"]["high"] == [1.0, 4.0]
    assert load_file(written / "predictor.safetensors")["feature.w_action"].shape[1] == 2


def test_ten_steps_are_four_and_six(tmp_path):
    manifest = write_game(tmp_path / "game")
    pretrain(config_of(manifest, train__steps=10), tmp_path / "whole")
    pretrain(config_of(manifest, train__steps=4), tmp_path / "parted")
    pretrain(config_of(manifest, train__steps=10), tmp_path / "parted", "auto")
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    ours, theirs = state(tmp_path / "whole", 10), state(tmp_path / "parted", 10)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    changed = {**HEADER, "actions": {**HEADER["actions"], "high": [1, 5]}}
    write_lines(manifest, changed, *rows_of_manifest(manifest))
    with pytest.raises(
        UserError, match=r"actions\.external\.high was \[1\.0, 4\.0\] when the run began and is \[1\.0, 5"
    ):
        pretrain(config_of(manifest, train__steps=12), tmp_path / "parted", "auto")


def test_evaluation_ranks_next_frames_rolls_out_and_shows_both(run, test_set, tmp_path, capsys):
    answer = tmp_path / "answer.json"
    assert main(["evaluate", str(run), "--data", str(test_set), "--json", str(answer)]) == 0
    assert "roll-outs: " in capsys.readouterr().err
    found = json.loads(answer.read_text())
    assert found["mrr_bank"] == 8
    assert found["mrr_chance"] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8)
    assert set(found) >= {"mrr_gain", "mrr_gain_interval", "mrr_shuffled", "mrr_neutral", "mrr_bypass", "mrr_protocol"}
    assert found["rollout"]["horizons"] == [1, 2, 3]
    assert len(found["rollout"]["copy_interval"]) == 3
    page = html.unescape((run / "report" / "index.html").read_text())
    for words in ("Roll-outs", "copy of the first frame", "horizon, actions", "the other action is their own", "push "):
        assert words in page
    assert f"{found['rollout']['model'][2]:.3f}" in page


def test_an_export_gives_the_run_s_numbers_and_its_card_names_the_actions(run, test_set, tmp_path):
    folder = export_run(run, tmp_path / "weights")
    found = evaluate_run(folder, test_set)
    wanted = evaluate_run(run, test_set)
    assert {key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)} == {"report"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "in the order of its vector: `push`, `turn`." in text
    assert "The actions are those of recorded triplets" in text


def test_only_requested_evaluations_run_and_missing_classes_are_said(run, test_set):
    found = evaluate_run(run, test_set, what=["rollout", "linear"])
    assert "mrr" not in found
    assert found["not_run"] == {"linear": "triplets have no classes"}


def test_data_that_do_not_fit_the_run_are_one_line(run, tmp_path, tiny_images):
    discrete = write_game(tmp_path / "other", discrete=True)
    with pytest.raises(UserError, match="its actions are discrete, and the run was trained on continuous ones"):
        evaluate_run(run, discrete)
    with pytest.raises(UserError, match="this is no manifest of triplets, which the run was trained on"):
        evaluate_run(run, tiny_images)
    with pytest.raises(UserError, match=r"set actions\.groups=\[external\]"):
        pretrain(small_config(discrete), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_discrete_actions_train_too(tmp_path):
    manifest = write_game(tmp_path / "game", discrete=True)
    pretrain(config_of(manifest, train__steps=2, model__predictor__conditioning="sequence+block"), tmp_path / "run")
    model, _, space, _ = load_model(tmp_path / "run")
    assert space.names == ("left", "stay", "right")
    assert model.action_dim == 3
    assert evaluate_run(tmp_path / "run", manifest, what=["mrr"])["mrr_bank"] == 8


def test_a_history_trains_resumes_is_evaluated_and_exported(tmp_path):
    manifest = write_game(tmp_path / "game")
    history = {"model__history": 2, "train__steps": 4}
    pretrain(config_of(manifest, **history), tmp_path / "whole")
    pretrain(config_of(manifest, **history | {"train__steps": 2}), tmp_path / "run")
    pretrain(config_of(manifest, **history, train__micro_batch=4), tmp_path / "run", "auto")
    assert losses(tmp_path / "run")[:2] == losses(tmp_path / "whole")[:2]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    begun, trained = (load_model(tmp_path / "run", f"step_00000{step}")[0] for step in (2, 4))
    assert not torch.equal(begun.predictor.time_embed, trained.predictor.time_embed)
    found = evaluate_run(tmp_path / "run", manifest)
    assert found["rollout"]["horizons"] == [1, 2, 3]
    assert found["mrr_bank"] == 8
    folder = export_run(tmp_path / "run", tmp_path / "weights")
    for name in ("pt2", "transformers"):
        with pytest.raises(
            UserError, match=rf"--format {name}: its predictor reads 2 frames .* give one or more of iwm"
        ):
            export_run(tmp_path / "run", tmp_path / name, formats=[name])
    again = evaluate_run(folder, manifest)
    assert (again["mrr"], again["rollout"]) == (found["mrr"], found["rollout"])
    keys = ("source", "target", "action")
    lines = [HEADER, *({key: row[key] for key in keys} for row in rows_of_manifest(manifest))]
    write_lines(manifest, *lines)
    with pytest.raises(UserError, match=r"its rows have no episode, and model\.history is 2"):
        evaluate_run(tmp_path / "run", manifest)


@pytest.mark.parametrize("history", [1, 3])
def test_several_steps_ahead_do_not_depend_on_how_the_batch_is_divided(tmp_path, history):
    """fp32, up to rounding; episodes of four steps end at other steps in each micro-batch."""
    manifest = write_game(tmp_path / "game", steps=4)
    changes = {"train__horizon": 3, "model__history": history, "train__steps": 3}
    variants = {
        "whole": {},
        "accumulated": {"train__micro_batch": 2},
        "checkpointed": {"train__activation_checkpointing": True, "zero__stage": 1},
    }
    for name, more in variants.items():
        pretrain(config_of(manifest, **changes, **more), tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        norms = [[record["grad_norm"] for record in metrics(tmp_path / run)] for run in (name, "whole")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert evaluate_run(tmp_path / "whole", manifest, what=["rollout"])["rollout"]["horizons"] == [1, 2, 3]
