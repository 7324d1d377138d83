"""conditioned_mlp against a float64 evaluation token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from iwm_fast.kernels import conditioned_mlp, conditioned_mlp_bytes, conditioned_mlp_flops, use_backend

LENGTHS = {
    "ragged": [3, 1, 7],
    "image without tokens": [4, 0, 2],
    "no tokens": [0, 0],
    "no images": [],
    "one image": [13],
}


def arguments(
    lengths: list[int], *, width: int = 7, hidden: int = 11, actions: int = 3, **options: bool
) -> dict[str, Any]:
    """Return random float64 arguments that require gradients; odd sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    out = width if options.get("residual", True) else 5
    given: dict[str, Any] = {
        "x": draw(sum(lengths), width),
        "w_in": draw(hidden, width),
        "b_in": draw(hidden),
        "w_out": draw(out, hidden),
        "b_out": draw(out),
        "residual": options.get("residual", True),
    }
    if options.get("norm", True):
        given |= {"norm_weight": draw(width), "norm_bias": draw(width)}
    if options.get("action", True):
        bounds = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
        given |= {"action": draw(len(lengths), actions), "w_action": draw(hidden, actions), "cu_seqlens": bounds}
    return given


def plain(given: dict[str, Any], eps: float = 1e-6) -> Tensor:
    """Evaluate token by token, each sum written out."""
    rows = []
    for n, row in enumerate(given["x"]):
        h = row
        if "norm_weight" in given:
            centred = row - row.sum() / len(row)
            h = centred / torch.sqrt((centred**2).sum() / len(row) + eps) * given["norm_weight"] + given["norm_bias"]
        h = torch.einsum("hd,d->h", given["w_in"], h) + given["b_in"]
        if "action" in given:
            image = next(i for i, end in enumerate(given["cu_seqlens"][1:].tolist()) if n < end)
            h = h + torch.einsum("ha,a->h", given["w_action"], given["action"][image])
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        out = torch.einsum("oh,h->o", given["w_out"], h) + given["b_out"]
        rows.append(out + row if given["residual"] else out)
    return torch.stack(rows) if rows else given["x"].new_zeros(0, given["w_out"].shape[0])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("action", [True, False], ids=["action", "no action"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_every_gradient(lengths: list[int], residual: bool, action: bool, norm: bool) -> None:
    """To 1e-12: float64 loses 1e-16 per rounding, and the longest sum has 13 terms."""
    given = arguments(lengths, residual=residual, action=action, norm=norm)
    leaves = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    ours, theirs = conditioned_mlp(**given), plain(given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    if not sum(lengths):
        grads = torch.autograd.grad((ours * weight).sum(), list(leaves.values()), allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
        return
    for name, got, expected in zip(
        leaves,
        torch.autograd.grad((ours * weight).sum(), list(leaves.values())),
        torch.autograd.grad((theirs * weight).sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_non_contiguous_inputs() -> None:
    given = arguments([5, 6])
    strided = dict(given)
    for name in ("x", "w_in", "w_out", "action", "w_action"):
        strided[name] = given[name].detach().t().contiguous().t()
        assert not strided[name].is_contiguous()
    torch.testing.assert_close(conditioned_mlp(**strided), conditioned_mlp(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_stays_within_its_rounding(dtype: torch.dtype) -> None:
    """The path has four roundings to the dtype (norm, hidden, activation, result), each half an eps of what it rounds;
    weights are scaled so that these are about 1, and inputs about 4."""
    given = arguments([40, 24], width=64, hidden=96)
    exact = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    exact["w_in"], exact["w_out"] = exact["w_in"] / 8, exact["w_out"] / 10
    low = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in exact.items()}
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in low.items()}
    out = conditioned_mlp(**low)
    assert out.dtype == dtype
    error = (out.double() - conditioned_mlp(**exact)).abs()
    assert error.max() < 8 * torch.finfo(dtype).eps * 4
    assert error.mean() < 4 * torch.finfo(dtype).eps


def test_norm_statistics_are_fp32_for_half_inputs() -> None:
    """Around a mean of 1000 with std 1, bf16 statistics would lose the std altogether."""
    x = (torch.tensor([[1000.0, 1008.0, 992.0, 1000.0]])).bfloat16()
    eye, zero = torch.eye(4).bfloat16(), torch.zeros(4).bfloat16()
    # The first layer is LayerNorm plus 10, where GELU is the identity.
    out = conditioned_mlp(x, eye, zero + 10, eye, zero - 10, norm_weight=zero + 1, norm_bias=zero)
    expected = torch.nn.functional.layer_norm(x.float(), (4,), eps=1e-6)
    assert (out.float() - expected).abs().max() <= 0.125  # bf16 around 10 is spaced 1/16


REFUSED = {
    "x": ({"x": torch.zeros(3)}, "x has shape"),
    "x integer": ({"x": torch.zeros(11, 7, dtype=torch.int64)}, "x is torch.int64"),
    "w_in": ({"w_in": torch.zeros(11, 8, dtype=torch.float64)}, "w_in has shape"),
    "b_in": ({"b_in": torch.zeros(10, dtype=torch.float64)}, "b_in has shape"),
    "w_out": ({"w_out": torch.zeros(7, 12, dtype=torch.float64)}, "w_out has shape"),
    "b_out": ({"b_out": torch.zeros(8, dtype=torch.float64)}, "b_out has shape"),
    "type of w_out": ({"w_out": torch.zeros(7, 11)}, "w_out is torch.float32"),
    "device of b_in": ({"b_in": torch.zeros(11, dtype=torch.float64, device="meta")}, "b_in is on meta"),
    "residual": ({"w_out": torch.zeros(5, 11).double(), "b_out": torch.zeros(5).double()}, "residual is True"),
    "action": ({"action": torch.zeros(3, dtype=torch.float64)}, "action has shape"),
    "w_action": ({"w_action": torch.zeros(11, 4, dtype=torch.float64)}, "w_action has shape"),
    "no w_action": ({"w_action": None}, "w_action is missing"),
    "no cu_seqlens": ({"cu_seqlens": None}, "cu_seqlens is missing"),
    "w_action alone": ({"action": None, "cu_seqlens": None}, "w_action is given without action"),
    "cu_seqlens length": ({"cu_seqlens": torch.zeros(5, dtype=torch.int32)}, "cu_seqlens has shape"),
    "cu_seqlens type": ({"cu_seqlens": torch.tensor([0, 3, 4, 11])}, "cu_seqlens is torch.int64"),
    "cu_seqlens end": ({"cu_seqlens": torch.tensor([0, 3, 4, 10], dtype=torch.int32)}, "cu_seqlens must run from 0"),
    "cu_seqlens falls": ({"cu_seqlens": torch.tensor([0, 5, 4, 11], dtype=torch.int32)}, "cu_seqlens must run from 0"),
    "norm_bias": ({"norm_bias": None}, "norm_bias is missing"),
    "norm_weight": ({"norm_weight": torch.zeros(8, dtype=torch.float64)}, "norm_weight has shape"),
    "eps": ({"eps": 0.0}, "eps is 0.0"),
    "activation": ({"activation": "relu"}, "activation is 'relu'"),
    "backend": ({"backend": "cuda"}, "backend is 'cuda'"),
    "triton in float64": ({"backend": "triton"}, "x is torch.float64; backend .triton. needs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        conditioned_mlp(**(arguments([3, 1, 7]) | change))


def test_counts_by_hand() -> None:
    """10 tokens, width 4, hidden 8, out 6, 2 images, 3 actions."""
    sizes = (10, 4, 8, 6)
    forward = 2 * 10 * 4 * 8 + 2 * 10 * 8 * 6 + 2 * 2 * 3 * 8
    assert conditioned_mlp_flops(*sizes, images=2, actions=3) == forward
    assert conditioned_mlp_flops(*sizes, images=2, actions=3, backward=True) == 2 * forward - 2 * 2 * 3 * 8
    assert conditioned_mlp_flops(*sizes, images=2, actions=3, backward=True, action_grad=True) == 2 * forward
    weights = 8 * 4 + 8 + 6 * 8 + 6 + 8 * 3 + 2 * 3 + 2 * 4
    assert conditioned_mlp_bytes(*sizes, images=2, actions=3, element=4) == 4 * (10 * 4 + 10 * 6 + weights)
    backward = 4 * (10 * 4 + 10 * 6 + 10 * 4 + 2 * weights)
    assert conditioned_mlp_bytes(*sizes, images=2, actions=3, element=4, backward=True) == backward


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_on_a_cpu_is_refused_in_one_line() -> None:
    given = {k: v.detach().float() if isinstance(v, Tensor) and v.is_floating_point() else v
             for k, v in arguments([3, 4]).items()}  # fmt: skip
    with pytest.raises(ValueError, match=r"x is on cpu; backend .triton. needs a CUDA device"):
        conditioned_mlp(**given, backend="triton")
    with use_backend("triton"), pytest.raises(ValueError, match="needs a CUDA device"):
        conditioned_mlp(**given)


def test_tanh_form_of_gelu() -> None:
    given = arguments([6], action=False, norm=False)
    x = given["x"].detach()
    hidden = torch.nn.functional.gelu(x @ given["w_in"].t() + given["b_in"], approximate="tanh")
    expected = hidden @ given["w_out"].t() + given["b_out"] + x
    torch.testing.assert_close(conditioned_mlp(**given, activation="gelu_tanh"), expected)
