"""A run and a checkpoint are found by every way to name them."""

import os

import pytest
import torch

from iwm_fast.engine.checkpoint.format import Fragment
from iwm_fast.engine.checkpoint.paths import chosen_checkpoint, named, whole_checkpoint
from iwm_fast.engine.checkpoint.writer import write
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.errors import UserError

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def save(run, *steps):
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for step in steps:
        write(run / "checkpoints", step, [Fragment("weight", "w", (3,), 0, torch.ones(3))], {"updates": step}, ALONE, 9)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Write run/ with steps 5 and 10, other/ with step 7, and links."""
    home = tmp_path_factory.mktemp("runs")
    for name, steps in (("run", (5, 10)), ("other", (7,))):
        (home / name).mkdir()
        (home / name / "config.yaml").touch()
        save(home / name, *steps)
    (home / "link").symlink_to("run")
    (home / "best").symlink_to("run/checkpoints/step_000005")
    (home / "saved").symlink_to("run/checkpoints")
    return home


NEWEST = ["run", "run/", "./run", "run/checkpoints", "run/checkpoints/", "run/checkpoints/latest", "link",
          "link/checkpoints/latest", "saved", "saved/latest", "other/../run"]  # fmt: skip
FIFTH = ["run/checkpoints/step_000005", "run/checkpoints/step_000005/", "link/checkpoints/step_000005", "best",
         "saved/step_000005", "run/checkpoints/../checkpoints/step_000005"]  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize(("path", "step"), [*((p, 10) for p in NEWEST), *((p, 5) for p in FIFTH)])
def test_each_way_to_name_a_checkpoint_finds_it_and_its_run(home, path, step, absolute, monkeypatch):
    monkeypatch.chdir(home)
    given = os.path.join(home, path) if absolute else path  # noqa: PTH118  (Path would take "./" and "/" away)
    found = named(type(home)(given))
    assert found.run.resolve() == home / "run"
    assert whole_checkpoint(found).resolve() == home / f"run/checkpoints/step_{step:06d}"


@pytest.mark.parametrize("path", ["latest", "step_000010", "../checkpoints", ".", "../../run"])
def test_paths_from_within_the_run_lead_to_it(home, path, monkeypatch):
    monkeypatch.chdir(home / "run/checkpoints")
    assert named(type(home)(path)).run.resolve() == home / "run"


@pytest.mark.parametrize(
    ("which", "step"),
    [
        ("latest", 10),
        ("step_000005", 5),
        ("step_000005/", 5),
        ("run/checkpoints/step_000005", 5),
        ("checkpoints/step_000005", 5),
        ("run/checkpoints/latest", 10),
        ("best", 5),
    ],
)
def test_the_option_takes_a_name_or_a_path(home, which, step, monkeypatch):
    monkeypatch.chdir(home)
    assert whole_checkpoint(chosen_checkpoint(type(home)("run"), which)).name == f"step_{step:06d}"


def test_a_run_named_by_its_checkpoint_goes_with_the_option_where_both_agree(home):
    fifth = home / "run/checkpoints/step_000005"
    assert chosen_checkpoint(fifth).checkpoint == fifth
    assert chosen_checkpoint(fifth, "step_000005").checkpoint == fifth
    assert chosen_checkpoint(home / "run/checkpoints/latest", "step_000005").checkpoint == fifth
    with pytest.raises(UserError, match=r"names step_000005, and --checkpoint step_000010; name one of them"):
        chosen_checkpoint(fifth, "step_000010")
    with pytest.raises(UserError, match="is not of the run"):
        chosen_checkpoint(home / "run", str(home / "other/checkpoints/step_000007"))


def test_a_checkpoint_that_is_not_there_is_named_beside_those_that_are(home):
    with pytest.raises(UserError, match=r"step_000099: no such checkpoint; there are step_000005, step_000010"):
        whole_checkpoint(named(home / "run/checkpoints/step_000099"))


def test_a_damaged_one_is_refused_by_name_and_passed_over_by_run(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step_000002/index.json").unlink()
    with pytest.raises(UserError, match=r"step_000002: index\.json: .*name another checkpoint"):
        whole_checkpoint(named(tmp_path / "checkpoints/step_000002"))
    said = []
    assert whole_checkpoint(named(tmp_path), said.append).name == "step_000001"
    assert len(said) == 1
    assert "step_000002" in said[0]


def test_a_run_whose_folder_looks_like_a_checkpoint_is_a_run(tmp_path):
    run = tmp_path / "step_000003"
    run.mkdir()
    (run / "config.yaml").touch()
    assert named(run).run == run


def test_checkpoints_on_another_disk_belong_to_the_run_that_links_to_them(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    save(run, 4)
    for path in ("", "checkpoints", "checkpoints/latest", "checkpoints/step_000004"):
        found = named(run / path)
        assert found.run == run
        assert whole_checkpoint(found).name == "step_000004"
