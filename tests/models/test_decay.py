"""Weight decay by parameter name, the same in pretraining, finetuning and the cost model."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from torch import nn

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config, PredictorConfig
from iwm_fast.cost.memory import layout_of
from iwm_fast.engine.optimizer import parameter_groups
from iwm_fast.eval.finetune.fitting import Plan, _groups
from iwm_fast.eval.finetune.modes import MODES, reader_builder
from iwm_fast.models import IWM
from iwm_fast.models.decay import decayed_parameters
from iwm_fast.models.task_model import HeadShape

# Every parameter of every model, by the end of its name. Those of normalisations start with their module's name.
DECAYED = (
    "patch_embed.proj.weight", "attn.qkv.weight", "attn.proj.weight", "embed.weight", "predictor.proj.weight",
    "w_in", "w_out", "w_action", "feature.out.weight", "sequence.weight",
    "pool.q.weight", "pool.k.weight", "pool.v.weight", "pool.proj.weight", r"heads.\d+.out.weight",
)  # fmt: skip
UNDECAYED = (
    "bias", "b_in", "b_out", "norm_weight", "norm_bias", "norm1.weight", "norm.weight", "mask_token", "pool.query",
    "time_embed",
    r"task_tokens.\d+",
)  # fmt: skip
CONDITIONINGS = get_args(PredictorConfig.model_fields["conditioning"].annotation)
PREDICTORS = [("mlp", "none"), ("mlp", "block"), *(("vit", conditioning) for conditioning in CONDITIONINGS)]


def wanted(name: str) -> bool:
    """Return whether it is decayed; it is in exactly one of the lists."""
    found = [any(re.search(rf"(^|\.){end}$", name) for end in ends) for ends in (DECAYED, UNDECAYED)]
    assert sum(found) == 1, name
    return found[0]


def config_of(kind: str, conditioning: str, target: str = "ema", precision: str = "auto") -> Config:
    model = {
        "encoder": {"depth": 1, "width": 16, "heads": 2}, "image": 16, "patch": 4, "target": target,
        **({"history": 2} if kind == "vit" else {}),
        "predictor": {"kind": kind, "depth": 1, "width": 16, "heads": 2, "conditioning": conditioning},
    }  # fmt: skip
    model |= {} if precision == "auto" else {"target_precision": precision}
    actions = {"groups": ["external"], "external": {"kind": "discrete", "names": ["a", "b"]}} if kind == "vit" else {}
    return Config.model_validate({"model": model, "actions": actions})


def split(model: nn.Module, groups: list[dict[str, object]], decayed: str) -> dict[str, bool]:
    """Return the split by name, from an optimizer's groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: bool(group[decayed]) for group in groups for p in group["params"]}


@pytest.mark.parametrize(("kind", "conditioning"), PREDICTORS)
@pytest.mark.parametrize("target", ["ema", "shared"])
def test_pretraining_and_the_plan_split_by_the_names(kind: str, conditioning: str, target: str) -> None:
    config = config_of(kind, conditioning, target)
    model = IWM(config.model, action_dim(config.actions))
    trained = {name: wanted(name) for name, p in model.named_parameters() if p.requires_grad}
    assert split(model, parameter_groups(model), "decayed") == trained
    assert {p.name: p.decayed for p in layout_of(config).trained} == trained


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "conditioning"), [("vit", "sequence"), ("vit", "feature+block"), ("mlp", "block")])
def test_finetuning_splits_by_the_names(mode: str, kind: str, conditioning: str) -> None:
    if mode == "multitask" and kind == "mlp":
        pytest.skip("a task's token needs a vit predictor")
    config = config_of(kind, conditioning)
    model = IWM(config.model, action_dim(config.actions))
    shapes = {"image": HeadShape(3, dense=False), "patch": HeadShape(2, dense=True)}
    reader = reader_builder(model, mode, "pretrained", shapes, "context")()
    groups = list(_groups(reader, 0.1, Plan((0.1,), 1, weight_decay=0.3)))
    assert split(reader, groups, "weight_decay") == {
        n: wanted(n) for n, p in reader.named_parameters() if p.requires_grad
    }


def test_an_fp8_target_and_its_encoder_are_split_alike() -> None:
    model = IWM(config_of("vit", "block", precision="fp8").model, 3)
    of = decayed_parameters(model)
    assert list(of) == [name for name, _ in model.named_parameters()]
    assert all(of[name] == of[name.replace("target_encoder", "encoder")] for name in of)


def test_a_parameter_of_an_unknown_kind_is_refused() -> None:
    module = nn.Module()
    module.gate = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="gate is neither decayed nor not"):
        decayed_parameters(nn.Sequential(module))
