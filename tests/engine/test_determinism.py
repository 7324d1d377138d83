"""train.deterministic selects operators whose results repeat, while the training lasts."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from small_run import small_config

from iwm_fast.engine import train as training
from iwm_fast.engine.build import require_machine
from iwm_fast.engine.determinism import deterministic_operators, require_deterministic
from iwm_fast.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def asked():
    memory = torch.utils.deterministic
    return torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_determinism_is_enabled_on_a_gpu_during_the_training_only(monkeypatch, deterministic, device):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = small_config("images", train__deterministic=deterministic)
    before, on = asked(), deterministic and device == GPU
    with deterministic_operators(config, device):
        assert asked() == ((True, False) if on else before)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)
    assert asked() == before
    with contextlib.suppress(UserError), deterministic_operators(config, device):
        raise UserError("a training that fails")
    assert asked() == before
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_an_attention_that_has_no_deterministic_backward_pass_is_refused():
    for name in ("auto", "xformers", "sdpa", "varlen"):
        require_deterministic(small_config("images", train__deterministic=True, model__attention=name))
    require_deterministic(small_config("images", model__attention="cudnn"))
    config = small_config("images", train__deterministic=True, model__attention="cudnn")
    with pytest.raises(UserError, match=r"backward pass of model\.attention=cudnn is not deterministic: use auto"):
        require_deterministic(config)


@pytest.mark.parametrize("name", ["xformers", "cudnn", "varlen", "flash3", "flash_cute"])
def test_an_attention_that_this_machine_has_not_is_refused_before_anything_is_written(name):
    with pytest.raises(UserError, match=f"model.attention is {name}, which has no operator for cpu: use auto or sdpa"):
        require_machine(small_config("images", model__attention=name), CPU)


def test_a_training_runs_within_it(tiny_images, tmp_path, monkeypatch):
    def begin(config, device):
        raise ZeroDivisionError(config.train.deterministic, device.type)

    monkeypatch.setattr(training, "deterministic_operators", begin)
    with pytest.raises(ZeroDivisionError, match=r"\(True, 'c"):
        training.pretrain(small_config(tiny_images, train__deterministic=True), tmp_path / "run")
