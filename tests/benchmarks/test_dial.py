"""The dial's grids, and tables and plots of its results."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from iwm_fast.benchmarks.dial import GRIDS, SHOWN, draw, points, read_grid, tables
from iwm_fast.benchmarks.sweep import SCHEMA, adopt, curves, public
from iwm_fast.config import load_config
from iwm_fast.config.load import packaged_config
from iwm_fast.errors import UserError


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_combination_of_a_committed_grid_is_a_configuration(path):
    arms, held = points("dial.yaml", [str(path)])
    assert len(held[path.stem]) == len(read_grid(path.stem)) == len(arms)
    for arm in arms:
        load_config(packaged_config("dial"), arm["overrides"])


def test_a_combination_that_several_grids_hold_is_trained_once():
    arms, held = points("dial.yaml", ["conditioning", "difficulty"])
    assert held["conditioning"][-1] == held["difficulty"][1] == "as configured"
    assert [arm["name"] for arm in arms].count("as configured") == 1
    assert len(arms) == 3 + 3 - 1
    named = {arm["name"]: arm["overrides"] for arm in arms}
    assert named["as configured"] == []
    assert named["conditioning none"] == ["model.predictor.conditioning=none"]


def test_results_are_tabulated_and_plotted_and_missing_ones_left_out(tmp_path):
    arms, held = points("dial.yaml", ["difficulty"])
    extra = ("mrr_chance", "invariance_untrained", "equivariance_untrained", "linear_untrained")
    for number, arm in enumerate(arms[:2]):
        arm["runs"] = [{"evaluation": dict.fromkeys((*SHOWN, *extra), 0.1 * (number + seed))} for seed in range(2)]
    text = tables(arms, held)
    assert text.splitlines()[0] == "difficulty"
    assert "| strength 0.5 | 0.050 ± 0.635 |" in text  # mean of 0 and 0.1, Student's t of one degree of freedom
    assert "strength 2.0" not in text
    draw(arms[:2], tmp_path / "dial.png")
    assert Image.open(tmp_path / "dial.png").size[0] > 800


def test_a_stopped_sweep_is_reused_and_one_of_another_setting_is_refused(tmp_path):
    file = tmp_path / "dial.json"
    setting = {"schema": SCHEMA, "config": "dial.yaml", "common": ["a=1"], "measure": [], "data": "d1"}
    arms, _ = points("dial.yaml", ["difficulty"])
    arms[0]["runs"] = [{"seed": 0}]
    file.write_text(json.dumps(setting | {"arms": arms}))
    again, _ = points("dial.yaml", ["conditioning", "difficulty"])
    adopt(again, file, setting)
    assert {arm["name"]: arm["runs"] for arm in again if arm["runs"]} == {"strength 0.5": [{"seed": 0}]}
    adopt(again, tmp_path / "none.json", setting)
    other, _ = points("dial.yaml", ["conditioning"])
    adopt(other, file, setting)
    assert [(arm["name"], arm["runs"]) for arm in other if arm["runs"]] == [("strength 0.5", [{"seed": 0}])]
    with pytest.raises(UserError, match="measured with common"):
        adopt(again, file, setting | {"common": ["a=2"]})
    with pytest.raises(UserError, match=r"dial.json: measured on other data"):
        adopt(again, file, setting | {"data": "d2"})
    file.write_text(json.dumps({key: value for key, value in setting.items() if key != "data"} | {"arms": arms}))
    adopt(other, file, setting)  # an earlier version's
    for text in ("{", "[]", '{"schema": "iwm-fast-finetune-table/1"}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"dial.json: is not (JSON|of schema iwm-fast-arms/1)"):
            adopt(again, file, setting)


def test_a_variant_s_weights_are_found_again_without_the_folder_of_this_machine(tmp_path):
    file = tmp_path / "arms.json"
    setting = {"schema": SCHEMA, "config": "c.yaml", "common": [], "measure": [], "data": "d1"}
    kept = {"name": "frozen", "overrides": ["model.target_init=teacher"], "runs": [{"seed": 0}]}
    file.write_text(json.dumps(setting | {"arms": [kept]}))
    arms = [{"name": "frozen", "overrides": ["model.target_init=/big/runs/teacher"], "runs": []}]
    adopt(arms, file, setting)
    assert (arms[0]["runs"], arms[0]["overrides"]) == ([{"seed": 0}], ["model.target_init=/big/runs/teacher"])


def test_a_metric_of_training_is_tabulated_by_step():
    lines = [
        [{"step": 1, "loss": 1.0}, {"step": 2, "mrr": 0.1 + seed, "loss": 1.0}, {"step": 4, "mrr": None}]
        for seed in (0, 1)
    ]
    arms = [{"name": "a", "runs": [{"curve": own} for own in lines]}, {"name": "b", "runs": [{"curve": lines[0]}]}]
    assert curves(arms, "mrr").splitlines() == [
        "| mrr after step | a | b |",
        "|---|---|---|",
        "| 2 | 0.600 ± 6.353 | 0.100 |",
    ]


def test_a_recorded_command_has_no_folder_of_this_machine():
    words = ["c.yaml", "--data", "/big/photos", "eval.root=/big/photos", "data.root=photos", "model.lr=1/2"]
    assert public(["plugins=[/a/b.py, /c/d.py,e.py]", "a.b=[0.6,1]"]) == ["plugins=[b.py, d.py,e.py]", "a.b=[0.6,1]"]
    assert public(words) == ["c.yaml", "--data", "photos", "eval.root=photos", "data.root=photos", "model.lr=1/2"]
