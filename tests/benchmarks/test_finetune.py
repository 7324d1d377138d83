"""benchmarks.finetune: one row per mode and number of images, continued where a file has cells; its plot."""

import json
import sys

import pytest
from small_run import small_config

from iwm_fast.benchmarks import finetune
from iwm_fast.benchmarks.plots import finetune as plot
from iwm_fast.engine import pretrain
from iwm_fast.errors import UserError


@pytest.fixture
def commands(monkeypatch):
    """Replace the command by one that notes its words and returns a score that tells run and images apart."""
    given = []

    def measure(run, words):
        given.append((run.name, words))
        images = int(words[words.index("--limit") + 1]) if "--limit" in words else 0
        return {"top1": 0.1 + images / 1000 + 0.01 * int(run.name), "trained_parameters": 7}

    monkeypatch.setattr(finetune, "measure", measure)
    monkeypatch.setattr(finetune, "weights_and_seed", lambda run: (f"weights of {run}", int(run.name)))
    return given


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
    finetune.main()


def test_each_limit_has_a_row_of_each_mode_and_cells_of_the_file_are_not_run_again(
    commands, monkeypatch, tmp_path, capsys
):
    words = ["--data", "d", "--json", tmp_path / "f.json", "--steps", "5", "--arms", "linear head", "random predictor"]
    run(monkeypatch, "0", "1", *words, "--limit", "20", "50")
    assert len(commands) == 2 * 2 * 2
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| linear head, 20 images | 7 | 12.5% ± 6.4 | 12.0%, 13.0% |",
        "| random predictor, 20 images | 7 | 12.5% ± 6.4 | 12.0%, 13.0% |",
        "| linear head, 50 images | 7 | 15.5% ± 6.4 | 15.0%, 16.0% |",
        "| random predictor, 50 images | 7 | 15.5% ± 6.4 | 15.0%, 16.0% |",
    ]
    commands.clear()
    run(monkeypatch, "0", "1", "2", *words, "--limit", "20", "50", "100")
    # The third run's cells of two modes and three limits, and the first two runs' of the new limit.
    assert sorted(name for name, _ in commands) == ["0"] * 2 + ["1"] * 2 + ["2"] * 6
    arms = json.loads((tmp_path / "f.json").read_text())["arms"]
    assert {(arm["name"], arm["images"]): len(arm["runs"]) for arm in arms if arm["runs"]} == {
        (name, images): 3 for name in ("linear head", "random predictor") for images in (20, 50, 100)
    }
    commands.clear()
    run(monkeypatch, "0", *words, "--limit", "200", "--jobs", "2")
    assert len(commands) == 2
    arms = json.loads((tmp_path / "f.json").read_text())["arms"]
    assert [arm["images"] for arm in arms if arm["runs"]] == [200] * 2 + [20] * 2 + [50] * 2 + [100] * 2


def test_without_a_limit_there_is_one_row_per_mode_and_a_file_without_numbers_of_images_goes_on(
    commands, monkeypatch, tmp_path
):
    path = tmp_path / "f.json"
    run(monkeypatch, "0", "--data", "d", "--json", path)
    assert len(commands) == len(finetune.ARMS)
    document = json.loads(path.read_text())
    for arm in document["arms"]:
        del arm["images"]  # as older files
    path.write_text(json.dumps(document))
    run(monkeypatch, "0", "--data", "d", "--json", path)
    assert len(commands) == len(finetune.ARMS)


def test_cells_of_other_data_and_of_other_trainings_are_not_mixed(commands, monkeypatch, tmp_path):
    for name in ("d", "e"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(name.encode() * ord(name))
    words = ["--json", tmp_path / "f.json", "--arms", "linear head", "--data"]
    run(monkeypatch, "one/1", "one/2", *words, tmp_path / "d")
    assert [words[words.index("--seed") + 1] for _, words in commands] == ["1", "2"]
    run(monkeypatch, "one/2", *words, tmp_path / "d")  # in whatever order: its cell is there
    assert len(commands) == 2
    with pytest.raises(UserError, match=r"f\.json: measured on other data"):
        run(monkeypatch, "one/1", *words, tmp_path / "e")
    with pytest.raises(UserError, match=r"f\.json: measured another training's 2, or an earlier step"):
        run(monkeypatch, "other/2", *words, tmp_path / "d")
    with pytest.raises(UserError, match="runs' names: 2 is given twice"):
        run(monkeypatch, "one/2", "other/2", *words, tmp_path / "d")
    assert len(commands) == 2


def test_a_cell_is_of_the_run_s_newest_checkpoint_and_has_its_seed(tiny_images, tmp_path):
    pretrain(small_config(tiny_images, train__steps=1, train__seed=5), tmp_path / "run")
    first, seed = finetune.weights_and_seed(tmp_path / "run")
    pretrain(small_config(tiny_images, train__steps=2, train__seed=5), tmp_path / "run", "auto")
    assert seed == 5
    assert finetune.weights_and_seed(tmp_path / "run") != (first, seed)


def test_every_mode_tries_the_given_rates(commands, monkeypatch, tmp_path):
    run(monkeypatch, "0", "--data", "d", "--json", tmp_path / "f.json", "--lr", "1e-3,1e-2")
    assert len(commands) == len(finetune.ARMS)
    assert all(words[words.index("--lr") + 1] == "1e-3,1e-2" for _, words in commands)


def test_the_plot_shows_every_mode_and_says_when_there_is_no_number_of_images(commands, monkeypatch, tmp_path):
    run(monkeypatch, "0", "1", "--data", "d", "--json", tmp_path / "f.json", "--limit", "20", "50")
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "f.json"), str(tmp_path / "f.svg")])
    plot.main()
    text = (tmp_path / "f.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in finetune.ARMS)
    run(monkeypatch, "0", "--data", "d", "--json", tmp_path / "all.json")
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "all.json"), str(tmp_path / "all.svg")])
    with pytest.raises(SystemExit, match="--limit"):
        plot.main()
