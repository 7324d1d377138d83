"""The conditioned MLP with other libraries: with the parts that each lacks it computes the operator.

The libraries are not dependencies of this project. Modules with their interfaces, in plain PyTorch, replace them; where
a real library is installed, its interface is compared with the calls.
"""

from __future__ import annotations

import importlib
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iwm_fast.benchmarks import kernels
from iwm_fast.benchmarks.baselines import kernels as baselines
from iwm_fast.benchmarks.baselines import mlp as mlp_baselines
from iwm_fast.benchmarks.baselines.kernels import CONTENDERS
from iwm_fast.benchmarks.baselines.skipped import Skipped
from iwm_fast.benchmarks.cases.kernel_cases import Case, inputs
from iwm_fast.benchmarks.kernels import errors

ACTION = Case("conditioned_mlp", tokens=61, width=24, hidden=40, actions=3, images=4)
PLAIN = Case("conditioned_mlp", tokens=61, width=24, hidden=40)
LOSS = Case("stopgrad_l2", tokens=64, width=24, rows=90)
CPU = torch.device("cpu")
LIBRARIES = ("quack", "liger", "transformer engine")


class QuackMLP(nn.Module):
    """quack.mlp.MLP, which drops biases when it recomputes and has only GELU's tanh form."""

    def __init__(self, inputs, hidden, outputs, *, activation, device, dtype, recompute):
        super().__init__()
        assert activation == "gelu_tanh_approx"
        assert recompute
        self.fc1 = nn.Linear(inputs, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, outputs, bias=False, device=device, dtype=dtype)

    def forward(self, x):
        assert self.fc1.in_features % 8 == 0
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TransformerEngineModule(nn.Module):
    """Parameters with Transformer Engine's names."""

    def __init__(self, shapes, params_dtype, device):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, torch.nan, dtype=params_dtype, device=device)))


class LayerNormMLP(TransformerEngineModule):
    def __init__(self, hidden_size, ffn_hidden_size, eps, *, activation, params_dtype, device):
        assert activation == "gelu"
        d, h, self_eps = hidden_size, ffn_hidden_size, eps
        shapes = {"layer_norm_weight": (d,), "layer_norm_bias": (d,), "fc1_weight": (h, d), "fc1_bias": (h,)}
        super().__init__(shapes | {"fc2_weight": (d, h), "fc2_bias": (d,)}, params_dtype, device)
        self.eps = self_eps

    def forward(self, x):
        x = F.layer_norm(x, x.shape[1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        active = F.gelu(F.linear(x, self.fc1_weight, self.fc1_bias), approximate="tanh")
        return F.linear(active, self.fc2_weight, self.fc2_bias)


class LayerNormLinear(TransformerEngineModule):
    def __init__(self, in_features, out_features, eps, *, params_dtype, device):
        shapes = {"layer_norm_weight": (in_features,), "layer_norm_bias": (in_features,)}
        own = {"weight": (out_features, in_features), "bias": (out_features,)}
        super().__init__(shapes | own, params_dtype, device)
        self.eps = eps

    def forward(self, x):
        x = F.layer_norm(x, x.shape[1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return F.linear(x, self.weight, self.bias)


class Linear(TransformerEngineModule):
    def __init__(self, in_features, out_features, *, params_dtype, device):
        super().__init__({"weight": (out_features, in_features), "bias": (out_features,)}, params_dtype, device)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, X.shape[1:], W, B, eps)


STANDINS = {
    "quack.mlp": {"MLP": QuackMLP},
    "liger_kernel.transformers.functional": {"liger_layer_norm": liger_layer_norm},
    "transformer_engine.pytorch": {c.__name__: c for c in (LayerNormMLP, LayerNormLinear, Linear)},
}
MODULES = dict(zip(LIBRARIES, STANDINS, strict=True))


def put(monkeypatch, module, **names):
    """Insert a library's module with those names; its parents are empty."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:i]))
        made.__dict__.update(names if i == len(parts) else {"__path__": []})
        monkeypatch.setitem(mlp_baselines.sys.modules, made.__name__, made)


@pytest.fixture
def eagerly(monkeypatch):
    """torch.compile, which is slow, returns functions unchanged; ceilings of a small machine."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernels, "ceilings", lambda _: {"matmul_flops_per_s": 1e12, "copy_bytes_per_s": 1e10})


@pytest.mark.parametrize("case", [ACTION, PLAIN], ids=["action", "plain"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_added_to_a_library_gives_the_operator_and_every_gradient(monkeypatch, eagerly, name, case):
    put(monkeypatch, MODULES[name], **STANDINS[MODULES[name]])
    found = errors(CONTENDERS[name].make("conditioned_mlp"), CONTENDERS[name], case, CPU)
    given = inputs(case, CPU, torch.bfloat16)
    assert found.keys() == {"out", *(k for k, v in given.items() if torch.is_tensor(v) and v.requires_grad)}
    # A few roundings of 2⁻⁹; a CPU sums the gradients of the normalisation's weights in bf16.
    assert all(0 < error < (2**-5 if name.startswith("norm") else 2**-7) for name, error in found.items())


def test_the_tanh_form_is_held_to_itself(monkeypatch, eagerly):
    """With values that bf16 does not blur: GELU's two forms differ by 10⁻³, and each check rejects the other."""
    put(monkeypatch, "quack.mlp", MLP=QuackMLP)
    given = {
        k: v.detach().double() if v.is_floating_point() else v for k, v in inputs(ACTION, CPU, torch.bfloat16).items()
    }
    out = CONTENDERS["quack"].make("conditioned_mlp")(**given)
    apart = {}
    for gelu in ("gelu", "gelu_tanh"):
        exact = baselines.reference("conditioned_mlp", gelu)(**given)
        apart[gelu] = float((out - exact).norm() / exact.norm())
    assert apart["gelu_tanh"] < 1e-12
    assert apart["gelu"] > 1e-5


def rows(**chosen):
    found = kernels.measure([ACTION, LOSS], CPU, 2, lambda _: None, **chosen)["rows"]
    return {(row["case"]["operation"], row["contender"]): row for row in found}


def test_every_baseline_has_a_row_with_its_version_or_why_it_is_not_there(eagerly, monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(mlp_baselines.sys.modules, module.split(".")[0], None)
    said = []
    document = kernels.measure([ACTION, LOSS], CPU, 2, said.append)
    assert list(document["contenders"]) == list(CONTENDERS)
    found = {(row["case"]["operation"], row["contender"]): row for row in document["rows"]}
    assert found.keys() == {(o, c) for o in ("conditioned_mlp", "stopgrad_l2") for c in CONTENDERS}
    for name, package in zip(
        LIBRARIES, ("quack-kernels", "liger-kernel", "'transformer-engine[pytorch]'"), strict=True
    ):
        assert found["conditioned_mlp", name]["skipped"] == f"not installed (pip install {package})"
        assert found["stopgrad_l2", name]["skipped"] == "does not offer the operation"
        assert f"  {name} –" in "\n".join(said)
    for name in ("compile max-autotune", "compile max-autotune, CUDA graphs"):
        assert found["conditioned_mlp", name]["skipped"] == "needs a GPU"
        assert found["conditioned_mlp", name]["version"] == torch.__version__
    assert found["conditioned_mlp", "compile"]["p50"] > 0


def test_a_baseline_that_is_not_selected_has_a_row_too(eagerly):
    found = rows(contenders=["eager"])
    assert {row["contender"] for row in found.values() if "p50" in row} == {"eager"}
    others = {row["contender"]: row.get("skipped") for (_, name), row in found.items() if name != "eager"}
    assert others == dict.fromkeys(CONTENDERS.keys() - {"eager"}, "not selected")


class Wrong(QuackMLP):
    def forward(self, x):
        return super().forward(x) * 1.5


class Refusing(QuackMLP):
    def forward(self, x):
        raise NotImplementedError("no kernel for this device\nand more")


class Changed:
    """An interface of another version."""

    def __init__(self, *_):
        pass


@pytest.mark.parametrize(
    ("mlp", "said"),
    [
        (Wrong, "wrong result"),
        (Refusing, "failed: NotImplementedError: no kernel for this device"),
        (Changed, "failed: TypeError: "),
    ],
)
def test_a_library_that_is_wrong_or_fails_loses_its_own_row_only(monkeypatch, eagerly, mlp, said):
    put(monkeypatch, "quack.mlp", MLP=mlp)
    monkeypatch.setattr(mlp_baselines.torch.cuda, "get_device_capability", lambda _: (9, 0))
    chosen = CONTENDERS | {"quack": baselines.Contender("1", mlp_baselines.quack, refusals=baselines._quack_refusals)}
    monkeypatch.setattr(kernels, "CONTENDERS", chosen)
    found = rows(contenders=["eager", "quack"])
    assert found["conditioned_mlp", "quack"]["skipped"].startswith(said)
    assert "p50" not in found["conditioned_mlp", "quack"]
    assert found["stopgrad_l2", "eager"]["p50"] > 0


@pytest.mark.parametrize(
    ("capability", "case", "said"),
    [
        ((8, 0), ACTION, "needs sm_90 or newer; this is sm_80"),
        ((9, 0), Case("conditioned_mlp", tokens=8, width=20, hidden=40), "widths 20 and 40 are not multiples of 8"),
        ((9, 0), ACTION, None),
        ((12, 0), ACTION, None),
    ],
)
def test_quack_says_where_it_would_fall_back_to_pytorch(monkeypatch, capability, case, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    if said is None:
        mlp_baselines.quack_takes(case, device)
    else:
        with pytest.raises(Skipped, match=said):
            mlp_baselines.quack_takes(case, device)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'cutlass'", name="cutlass"),
            "does not import: No module named 'cutlass'",
        ),
        (OSError("libcuda.so.1: cannot open\nmore"), "does not import: OSError: libcuda.so.1: cannot open$"),
        (ModuleNotFoundError("No module named 'quack'", name="quack"), r"not installed \(pip install quack-kernels\)"),
    ],
)
def test_a_library_that_does_not_import_says_why(monkeypatch, error, said):
    def fail(_):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(Skipped, match=said):
        mlp_baselines.imported("quack.mlp", "quack-kernels")


def test_cuda_graphs_are_checked_as_they_are_replayed(monkeypatch):
    """A graph warms up, records and replays: the third call is the one to compare."""
    calls = []

    def run(pred, target, index):
        calls.append(1)
        out = baselines.reference("stopgrad_l2")(pred=pred, target=target, index=index)
        return out * 2 if len(calls) > 2 else out

    contender = CONTENDERS["compile max-autotune, CUDA graphs"]
    assert errors(run, contender, LOSS, CPU)["out"] == pytest.approx(1, rel=0.1)
    assert len(calls) == 3


CALLED = {
    "quack": {"MLP": (24, 40, 24, {"activation", "device", "dtype", "recompute"})},
    "liger": {"liger_layer_norm": (1, 2, 3, 4, set())},
    "transformer engine": {
        "LayerNormMLP": (24, 40, {"eps", "activation", "params_dtype", "device"}),
        "LayerNormLinear": (24, 40, {"eps", "params_dtype", "device"}),
        "Linear": (40, 24, {"params_dtype", "device"}),
    },
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "installed"])
def test_the_call_fits_the_interface(monkeypatch, name, real):
    if real:
        try:
            library = mlp_baselines.imported(MODULES[name], name)
        except Skipped as reason:
            pytest.skip(str(reason))
    else:
        library = types.SimpleNamespace(**STANDINS[MODULES[name]])
    for function, (*given, options) in CALLED[name].items():
        inspect.signature(getattr(library, function)).bind(*given, **dict.fromkeys(options))
