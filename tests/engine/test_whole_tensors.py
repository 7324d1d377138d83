"""Runs with the optimizers that need whole tensors: LAMB and Muon."""

from __future__ import annotations

import pytest
import torch
from small_run import losses, small_config, state

from iwm_fast.engine import pretrain

RATES = {"lamb": 0.02, "muon": 4e-3}


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("optimizer", RATES)
def test_a_run_learns_and_resumes_bit_for_bit(tiny_images, tmp_path, optimizer, precision) -> None:
    config = {"train__optimizer": optimizer, "train__lr": RATES[optimizer], "train__precision": precision}
    pretrain(small_config(tiny_images, **config), tmp_path / "straight")
    pretrain(small_config(tiny_images, train__steps=10, **config), tmp_path / "halves")
    pretrain(small_config(tiny_images, **config), tmp_path / "halves", resume="auto")
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    whole, halves = state(tmp_path / "straight", 20), state(tmp_path / "halves", 20)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", RATES)
def test_they_are_refused_where_tensors_are_divided(stage, optimizer, tiny_images) -> None:
    said = f"{optimizer} needs whole tensors, which zero.stage {stage} shards over ranks; use zero.stage 0, or adamw"
    with pytest.raises(ValueError, match=said):
        small_config(tiny_images, train__optimizer=optimizer, zero__stage=stage)
