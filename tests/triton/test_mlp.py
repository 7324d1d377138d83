"""conditioned_mlp on Triton against float64, and against the error of the eager reference in the same dtype."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import cast, conditions, distances, mlp_inputs, outcome

from iwm_fast.kernels import conditioned_mlp
from iwm_fast.kernels._mlp.workspace import use_workspace
from iwm_fast.kernels._tuning import tuner as _tuning
from iwm_fast.kernels._tuning.candidates import Choice
from iwm_fast.kernels._tuning.tuner import Tuner, use_tuner

HALF = [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
SHAPES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 45), min_size=1, max_size=4),
        "width": st.sampled_from([192, 384, 768, 100]),
        "hidden": st.sampled_from([40, 97, 160]),
        "out": st.just(33),
        "actions": st.one_of(st.none(), st.integers(1, 32)),
        "norm": st.booleans(),
        "residual": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def upstream(case, seed=1):
    rows, out = case["x"].shape[0], case["w_out"].shape[0]
    return torch.randn(rows, out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(case, **options):
    """Return errors of the Triton backend and of the eager reference, both in the case's dtype, against float64; and by
    how many times its inputs' roundings each result moves.
    """
    weight = upstream(case).to(case["x"].dtype).double()

    def evaluate(given):
        return outcome(given, weight, backend="reference", **options)

    exact = evaluate(cast(case, torch.float64, "cpu"))
    ours = outcome(case, weight, backend="triton", **options)
    eager = outcome(case, weight, backend="reference", **options)
    assert all(g is not None and g.shape == exact[name].shape for name, g in ours.items())
    return distances(ours, exact), distances(eager, exact), conditions(case, exact, evaluate)


@settings(max_examples=15)
@given(shape=SHAPES, scale=st.sampled_from([1e-4, 1.0, 1e3]), activation=st.sampled_from(["gelu", "gelu_tanh"]))
def test_fp32_output_and_gradients_to_1e_5(shape, scale, activation, device):
    """One rounding is 6e-8; a blocked sum of 768 products leaves a few of them, and cancellation amplifies them."""
    ours, _, larger = compare(mlp_inputs(**shape, scale=scale, device=device), activation=activation)
    for name, error in ours.items():
        assert error <= 1e-5 * larger[name], (name, error, larger[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@settings(max_examples=10)
@given(shape=SHAPES, scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_half_is_never_much_less_accurate_than_eager(dtype, shape, scale, device):
    """At most 1.5 times eager's error; the effect of one rounding of all values is allowed whatever eager's error."""
    ours, eager, larger = compare(mlp_inputs(**shape, scale=scale, dtype=dtype, device=device))
    for name, error in ours.items():
        one = torch.finfo(dtype).eps / 2 * larger[name]
        assert error <= max(1.5 * eager[name], one), (name, error, eager[name], larger[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_is_as_accurate_as_eager_in_the_median(dtype, device):
    ratios = []
    for seed, width in enumerate([192, 384, 768, 100, 192, 384]):
        case = mlp_inputs([29, 0, 41], width=width, hidden=130, seed=seed, dtype=dtype, device=device)
        ours, eager, _ = compare(case)
        ratios += [ours[name] / eager[name] for name in ours]
    assert median(ratios) <= 1.1, median(ratios)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=["no images", "one empty", "three empty"])
def test_no_tokens_give_no_rows_and_zero_gradients(lengths, device):
    case = mlp_inputs(lengths, width=24, hidden=40, device=device)
    found = outcome(case, upstream(case), backend="triton")
    assert found["out"].shape == (0, 24)
    assert not any(g.any() for name, g in found.items() if name != "out")


def test_non_contiguous_inputs_give_the_same(device):
    case = mlp_inputs([13, 0, 22], width=48, hidden=40, device=device)
    strided = dict(case)
    for name in ("x", "w_in", "w_out", "action", "w_action"):
        strided[name] = case[name].detach().t().contiguous().t().requires_grad_()
        assert not strided[name].is_contiguous()
    for name in ("b_in", "b_out", "norm_weight", "norm_bias"):
        strided[name] = case[name].detach().repeat_interleave(2)[::2].requires_grad_()
    weight = upstream(case).t().contiguous().t()
    ours, theirs = outcome(strided, weight, backend="triton"), outcome(case, weight, backend="triton")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(bad, norm, dtype, device):
    case = mlp_inputs([9, 12], width=24, hidden=40, norm=norm, dtype=dtype, device=device)
    plain = conditioned_mlp(**case, backend="triton")
    with torch.no_grad():
        case["x"][5, 3] = bad
    found = outcome(case, upstream(case), backend="triton")
    assert not found["out"][5].isfinite().any()
    others = torch.arange(21, device=device) != 5
    assert torch.equal(found["out"][others], plain[others])
    assert not found["x"][5].isfinite().any()
    assert found["x"][others].isfinite().all()
    assert found["w_in"].isnan().any()
    assert found["w_out"].isnan().any()


def test_a_weight_that_is_not_finite_reaches_every_row(device):
    case = mlp_inputs([9, 12], width=24, hidden=40, device=device)
    with torch.no_grad():
        case["w_in"][7, 2] = float("nan")
    assert conditioned_mlp(**case, backend="triton").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("actions", [3, None], ids=["action", "no action"])
def test_every_element_is_written(actions, norm, dtype, device, monkeypatch):
    """Allocated memory is full of NaN; whatever is left unwritten, or read before, shows."""
    case = mlp_inputs([31, 0, 39], width=100, hidden=72, actions=actions, norm=norm, dtype=dtype, device=device)
    expected = outcome(case, upstream(case), backend="triton")
    empty = torch.empty

    def poisoned(*shape, **options):
        fresh = empty(*shape, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
    found = outcome(case, upstream(case), backend="triton")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_equal_inputs_give_equal_bits(dtype, device):
    case = mlp_inputs([50, 0, 83, 7], width=96, hidden=72, dtype=dtype, device=device)
    first = outcome(case, upstream(case), backend="triton")
    second = outcome(case, upstream(case), backend="triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunks_of_tokens_change_nothing(device):
    """200 tokens in one chunk, in chunks of 64 that cut images, and between; weights' gradients are summed over all."""
    case = mlp_inputs([70, 1, 129], width=48, hidden=40, device=device)
    found = []
    for size in (2**30, 1, 2**15):
        with use_workspace(size):
            found.append(outcome(case, upstream(case), backend="triton"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5)


def test_a_call_has_its_own_limit_and_the_same_bits_each_time(device):
    """Its backward pass too, in any autograd thread, and whatever the process's limit is."""
    case = mlp_inputs([70, 1, 129], width=48, hidden=40, device=device)
    with use_workspace(2**15):
        chunked = outcome(case, upstream(case), backend="triton")
    first, second = (outcome(case, upstream(case), backend="triton", workspace=2**15) for _ in range(2))
    for name, value in chunked.items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)


CHOICES = {
    "library": Choice("library"),
    "narrow": Choice("triton", 16, 64, 32, 4, 1),
    "wide": Choice("triton", 64, 16, 16, 4, 1),
    "in pieces": Choice("triton", 32, 32, 32, 4, 1, 2),
    "by descriptors": Choice("tma", 32, 32, 32, 4, 1),
    "by descriptors in pieces": Choice("tma", 16, 64, 32, 4, 1, 2),
}


class Fixed:
    """Replaces the tuner: one choice for every matmul that it can run."""

    def __init__(self, choice):
        self.choice = choice

    def run(self, _product, dtype, _sizes, call, about):
        possible = self.choice.by != "tma" or (about.startswith("tma") and dtype.itemsize == 2)
        return call(self.choice if possible else CHOICES["narrow"])


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("actions", "norm"),
    [
        pytest.param(3, True, id="both"),
        pytest.param(None, False, id="neither"),
        pytest.param(3, False, id="action", marks=pytest.mark.slow),
        pytest.param(None, True, id="norm", marks=pytest.mark.slow),
    ],
)
def test_every_implementation_gives_the_same(choice, dtype, actions, norm, device):
    case = mlp_inputs([33, 0, 18], width=104, hidden=72, actions=actions, norm=norm, dtype=dtype, device=device)
    with use_tuner(Fixed(choice)):
        ours, eager, larger = compare(case)
    for name, error in ours.items():
        one = torch.finfo(dtype).eps / 2 * larger[name]
        limit = 1e-5 * larger[name] if dtype == torch.float32 else max(1.5 * eager[name], one)
        assert error <= limit, (name, error, eager[name], larger[name])


@pytest.mark.parametrize(
    ("actions", "dtype", "fastest"),
    [
        (3, torch.bfloat16, "narrow"), (None, torch.float32, "library"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((3, torch.float32, "narrow"), (3, torch.bfloat16, "library"), (None, torch.bfloat16, "narrow"))
        ),
    ],
    ids=str,
)  # fmt: skip
def test_timing_the_kernels_of_a_chunked_call_leaves_its_gradients(
    actions, dtype, fastest, tmp_path, device, monkeypatch
):
    """Chunks of 64, 64 and 22 tokens: the last is timed too, in its own bucket, when there are partial sums already."""
    choices = [CHOICES["narrow"], CHOICES["library"]]
    monkeypatch.setattr(_tuning, "candidates_of", lambda *_: choices)
    timed = []

    def seconds(call):
        for _ in range(3):
            call()
        timed.append(call)
        return 1.0 if choices[(len(timed) - 1) % 2] == CHOICES[fastest] else 2.0

    case = mlp_inputs([70, 1, 79], width=48, hidden=40, actions=actions, dtype=dtype, device=device)
    with use_workspace(1):
        with use_tuner(Fixed(CHOICES[fastest])):
            expected = outcome(case, upstream(case), backend="triton")
        with use_tuner(Tuner("A_GPU", "sm_90", 10**9, tmp_path, seconds)):
            found = outcome(case, upstream(case), backend="triton")
    assert timed
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_frozen_weights_get_no_gradient(device):
    case = mlp_inputs([9, 12], width=24, hidden=40, device=device)
    for name, value in case.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "x":
            case[name] = value.detach()
    expected = outcome(cast(case, torch.float32), upstream(case), backend="triton")
    found = outcome(case, upstream(case), backend="triton")
    assert list(found) == ["out", "x"]
    assert torch.equal(found["x"], expected["x"])


def test_precision_of_fp32_matmuls_is_what_torch_is_set_to(device):
    """TF32 keeps 10 bits of the mantissa; the interpreter has none and stays exact."""
    case = mlp_inputs([40], width=64, hidden=64, device=device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        ours, _, _ = compare(case)
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(ours.values()) <= 5e-3


@pytest.mark.parametrize("actions", [None, 3, 0])
@pytest.mark.parametrize(
    "sizes", [{"width": 0, "hidden": 5}, {"width": 4, "hidden": 0}, {"width": 4, "hidden": 5, "out": 0}], ids=str
)
def test_a_dimension_of_nothing_leaves_the_biases(sizes, actions, device):
    case = mlp_inputs([2, 0, 3], **sizes, actions=actions, residual="out" not in sizes, device=device)
    weight = upstream(case)
    found, expected = (outcome(case, weight, backend=backend) for backend in ("triton", "reference"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
