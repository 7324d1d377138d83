"""Scaling and the step's benchmark: counted bytes, fitted lines, and a wrong loss stops the measurement."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from made_triplets import write_game

from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.benchmarks import scaling, step
from iwm_fast.benchmarks.cases.presets import PRESETS, preset_config
from iwm_fast.benchmarks.scaling import fit_line
from iwm_fast.benchmarks.step import check_answer, row_of
from iwm_fast.cli.main import main
from iwm_fast.config.external import ExternalActions
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.errors import UserError
from iwm_fast.measure.batches import described, opened_stream
from iwm_fast.measure.collective_time import timed_collectives
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.memory import peak_of
from iwm_fast.measure.operations import OperationCounter
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.measure.timing import Clocked

SMALL = ("model.encoder={depth: 1, width: 32, heads: 2}", "model.predictor.depth=1", "model.predictor.width=32")


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_ranks_say_what_the_formula_says(stage):
    """Payload of the large collectives, exact except for a few bytes of norms and flags."""
    config = preset_config("cpu-micro", (*SMALL, f"zero.stage={stage}", "train.global_batch=4"))
    rows = scaling.measure_ranks(config, worlds=(2,), kinds=("weak",), repeats=2, say=lambda _: None)
    for row in rows:
        counted, expected = row["collectives_a_step"]["payload_bytes"], row["expected_bytes"]
        assert counted["all_reduce"] - expected["all_reduce"] in range(65)
        assert counted.get("all_gather", 0) == expected.get("all_gather", 0)
        assert row["collectives_a_step"]["seconds"] > 0
    assert [(row["name"], row["images"]) for row in rows] == [("weak 2", 8)]


def test_a_line_is_found_with_its_residuals():
    x = [1, 2, 4, 8, 512]
    exact = fit_line(x, [3 + 0.5 * v for v in x])
    assert (exact["slope"], exact["intercept"]) == (pytest.approx(0.5), pytest.approx(3))
    assert np.abs(exact["residuals"]).max() < 1e-12
    bent = fit_line(x, [3 + 0.5 * v + (2 if v == 4 else 0) for v in x])
    assert np.argmax(bent["residuals"]) == 2


def test_collectives_are_timed_once_and_the_functions_put_back():
    start()
    before = dist.all_reduce
    edges: list[int] = []
    with timed_collectives() as spent:
        spent.entered, spent.left = (lambda: edges.append(1)), (lambda: edges.append(-1))
        dist.all_reduce(torch.zeros(6))
        work = dist.all_reduce(torch.zeros(4, dtype=torch.float64), async_op=True)
        work.wait()
        gathered = torch.zeros(3)
        dist.all_gather_into_tensor(gathered, torch.ones(3))
    assert dist.all_reduce is before
    assert gathered.tolist() == [1, 1, 1]
    assert edges == [1, -1] * 4  # three calls and one wait, none inside another
    assert spent.seconds > 0


def test_peak_memory_is_that_of_the_work():
    size = 64 * 2**20
    cpu = torch.device("cpu")
    for _ in range(2):  # memory that the first has freed is not the second's
        assert size * 0.9 < peak_of(lambda: torch.ones(size, dtype=torch.uint8), cpu) < size * 1.5
    assert peak_of(lambda: None, cpu) < size / 4


def test_a_share_of_the_batch_is_each_ranks_own():
    """Two ranks together process the images of one, and know the whole batch's tokens."""
    config, space = preset_config("cpu-micro", ("train.global_batch=6",)), ActionSpace()
    whole = next(iter(synthetic_stream(config, space, torch.device("cpu"))))
    halves = [next(iter(synthetic_stream(config, space, torch.device("cpu"), rank=r, world=2))) for r in range(2)]
    assert np.concatenate([half.ids for half in halves]).tolist() == whole.ids.tolist()
    assert np.concatenate([half.patches.context for half in halves]).tolist() == whole.patches.context.tolist()
    assert {half.global_target for half in halves} == {whole.global_target} == {len(whole.patches.target)}


def test_the_step_is_timed_after_its_loss_was_checked(tmp_path, capsys):
    file = tmp_path / "step.json"
    words = ["bench", "step", "--preset", "cpu-micro", *SMALL, "train.global_batch=4", "--repeats", "3"]
    assert main([*words, "--threads", "1", "--device", "cpu", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    (row,) = document["rows"]
    assert document["schema"] == "iwm-fast-bench-step/1"
    assert len(row["seconds"]) == len(row["cpu_seconds"]) == 3
    assert row["loss_error"] < 1e-4
    assert row["images_per_s"] == pytest.approx(4 / row["median_s"])
    assert row["operations_per_s"] == pytest.approx(row["operations_per_image"] * row["images_per_s"])
    assert "cpu-micro" in capsys.readouterr().out


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("predictor", ["vit", "mlp"])
def test_all_sources_of_a_target_are_timed_and_counted(sources, predictor):
    """Equal to the FLOPs that torch counts in the timed step, of images each with one target and K sources."""
    changes = [f"views.sources_per_target={sources}", f"model.predictor.kind={predictor}", "train.global_batch=4"]
    config = preset_config("cpu-micro", (*SMALL, *changes, "model.predictor.conditioning=block"))
    ranks, space = start(), space_of(config.actions)
    stream = synthetic_stream(config, space, ranks.device, steps=1)
    (batch,) = stream._batches
    assert len(batch.source) == len(batch.action) == len(batch.patches) == 4 * sources
    assert len(batch.target) == len(batch) == 4
    trainer = prepare_trainer(config, space, stream, ranks)
    assert check_answer(trainer, config, batch, space) < 1e-4
    trainer.train_step()
    with OperationCounter() as counter:
        trainer.train_step()
    row = row_of("x", config, space, [Clocked(0.5, 0.5)], ranks.device)
    assert row["operations_per_image"] * 4 == sum(work.operations for work in counter.by_operator.values())
    assert (row["images"], row["sources_per_target"]) == (4, sources)
    assert (row["images_per_s"], row["sources_per_s"]) == (8, 8 * sources)


def test_triplets_are_timed_with_their_own_actions(tmp_path):
    root = write_game(tmp_path / "game")
    changes = ("actions.groups=[external]", "train.global_batch=4", "data.threads=1", "data.prefetch=1")
    config, triplets = described(preset_config("cpu-micro", (*SMALL, *changes)), root)
    assert config.actions.external.names == ("push", "turn")
    with opened_stream(config, space_of(config.actions), start(), root, triplets) as stream:
        batch = next(iter(stream))
    assert batch.action.shape == (4, 2)
    assert batch.action.abs().max() <= 1


MANIFEST = {"kind": "continuous", "names": ["push"], "low": [-1.0], "high": [1.0], "neutral": [0.0]}


def test_external_actions_are_what_the_configuration_says(tmp_path):
    """Random pixels need only the actions' names; without them, the same error as in training."""
    external = preset_config("cpu-micro", (*SMALL, "actions.groups=[external]"))
    with pytest.raises(UserError, match="this is no manifest of triplets"):
        described(external, None)
    actions = external.actions.model_copy(update={"external": ExternalActions(**MANIFEST)})
    told = external.model_copy(update={"actions": actions})
    assert described(told, None) == (told, None)
    (batch, *_) = synthetic_stream(told, space_of(told.actions), torch.device("cpu"))._batches
    assert batch.action.shape == (len(batch), 1)


def test_a_wrong_loss_is_not_timed(monkeypatch):
    config = preset_config("cpu-micro", (*SMALL, "train.global_batch=4"))
    monkeypatch.setattr(step, "TOLERANCE", {"fp32": 1e-12})
    with pytest.raises(step.WrongAnswerError, match="not timed"):
        step.measure_step("x", config, start(), repeats=1, say=lambda _: None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name):
    assert preset_config(name).train.global_batch >= 32


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="no such preset; choose from cpu-micro"):
        preset_config("cpu-none")


def test_batches_from_one_to_many_are_measured_as_a_line(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    words = ["bench", "scaling", "--what", "batches", "--largest", "8", "--repeats", "2", *SMALL]
    assert main([*words, "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert [row["images"] for row in document["rows"]] == [1, 2, 4, 8]
    assert {"seconds", "cpu_seconds", "memory_bytes"} == set(document["lines"])
    assert all(len(line["residuals"]) == 4 for line in document["lines"].values())
    assert "per image; residuals" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kernels", "--only", "nothing"], "no such operation; choose from conditioned_mlp"),
        (["step", "--device", "gpu"], "--device: gpu: must be cpu or cuda"),
        (["step", "--preset", "cpu-none", "--device", "cpu"], "no such preset"),
        (["scaling", "--what", "weak"], "--what weak: give batches"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
