"""What the plan says an update holds, against the storages that are alive while one runs."""

import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iwm_fast.actions.external import space_of
from iwm_fast.cli.plan import planner_of
from iwm_fast.config import load_config, packaged_config
from iwm_fast.cost.devices import DEVICES, Rate
from iwm_fast.cost.memory import layout_of
from iwm_fast.cost.plan import Cluster
from iwm_fast.cost.update_memory import update_bytes
from iwm_fast.engine.lamb import FiniteLamb
from iwm_fast.engine.muon import FiniteMuon
from iwm_fast.engine.optimizer import FiniteAdamW, ensure_state, parameter_groups
from iwm_fast.models.iwm import IWM


class Alive(TorchDispatchMode):
    """The most bytes of storages that were made in this mode and are alive at once."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.seen = dict.fromkeys(tensor.untyped_storage()._cdata for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.now += size
            self.seen[key] = weakref.ref(storage, partial(self.gone, key, size))

    def gone(self, key, size, _):
        self.now -= size
        del self.seen[key]


def of(optimizer, precision, *words):
    return load_config(
        packaged_config("demo.yaml"), [f"train.optimizer={optimizer}", f"train.precision={precision}", *words]
    )


def measured(config):
    """Return the bytes of one update."""
    made = {"adamw": FiniteAdamW, "lamb": FiniteLamb, "muon": FiniteMuon}[config.train.optimizer]
    working = {"working": torch.bfloat16} if config.train.precision == "bf16" and made is FiniteMuon else {}
    optimizer = made(parameter_groups(IWM(config.model, space_of(config.actions).dim)), **working)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    ensure_state(optimizer, weights)
    state = [tensor for own in optimizer.state.values() for tensor in own.values()]
    with Alive([*weights, *(weight.grad for weight in weights), *state]) as alive:
        optimizer.step()
    return alive.most


CASES = [("adamw", "fp32"), ("lamb", "fp32"), ("lamb", "bf16"), ("muon", "fp32"), ("muon", "bf16")]


@pytest.mark.parametrize(("optimizer", "precision"), CASES)
def test_an_update_holds_what_the_plan_counts(optimizer, precision):
    config = of(optimizer, precision)
    assert measured(config) == pytest.approx(update_bytes(config, layout_of(config), 1), rel=2e-3, abs=2000)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_several_ranks_the_fullest_counts(precision, monkeypatch):
    """Each of three in turn, with an all-gather that sends nothing: another test's process group may be there."""
    config, found = of("muon", precision), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *_: None)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(measured(config))
    assert max(found) == pytest.approx(update_bytes(config, layout_of(config), 3), rel=2e-3)


def test_the_plan_adds_it_where_activations_are_less():
    one = Cluster(DEVICES["h100"], 1, 1, Rate(0.4, "given", "--mfu"), 50e9)
    few, many = (
        {
            name: planner_of(of(name, "bf16", f"train.global_batch={images}")).configured(one).memory
            for name in ("adamw", "lamb", "muon")
        }
        for images in (1, 512)
    )
    assert few["adamw"].total < few["muon"].total < few["lamb"].total
    assert len({memory.total for memory in many.values()}) == 1
