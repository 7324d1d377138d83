"""Every operator with small inputs, the layouts that each argument must support, and the effects of autocast."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels import (
    conditioned_mlp,
    e4m3_rows,
    patchify,
    predictor_input,
    residual_norm,
    sigreg_sums,
    stopgrad_l2,
)
from iwm_fast.kernels.permutation import take_rows

__all__ = [
    "CASES",
    "CAST",
    "VIEWS",
    "Case",
    "check_autocast",
    "check_compiled_autocast",
    "check_layout",
    "check_second_derivatives",
    "outcome",
]


@dataclass(frozen=True)
class Case:
    """An operator's call, its tensors by name, and those whose values must differ: they are never expanded."""

    call: Callable[..., Any]
    tensors: dict[str, Tensor]
    distinct: tuple[str, ...] = ()


def _surrounded(shape: torch.Size, like: Tensor) -> Tensor:
    """Return a larger tensor around it of values that no result may contain: NaN, or the largest integer."""
    worst = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full(shape, worst, dtype=like.dtype, device=like.device)


def _strided(t: Tensor) -> Tensor:
    wide = _surrounded(torch.Size((*t.shape[:-1], 2 * t.shape[-1])), t)
    wide[..., ::2] = t
    return wide[..., ::2]


def _sliced(t: Tensor) -> Tensor:
    around = _surrounded(torch.Size(n + 2 for n in t.shape), t)
    inner = around[tuple(slice(1, -1) for _ in t.shape)]
    inner.copy_(t)
    return inner


def _transposed(t: Tensor) -> Tensor:
    around = _sliced(t.permute(*reversed(range(t.dim()))))
    return around.permute(*reversed(range(t.dim())))


def _turned(t: Tensor) -> Tensor:
    """Return it with its last dimension outermost in memory: channels first for images."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def _expanded(t: Tensor, dim: int) -> Tensor:
    one = _sliced(t.narrow(dim, 0, min(1, t.shape[dim])))
    return one.expand(t.shape)


def _negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t


# Expanding copies one row or column: compared are views and copies of the same values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": _strided,
    "sliced": _sliced,
    "transposed": _transposed,
    "channels outermost": _turned,
    "rows expanded": partial(_expanded, dim=0),
    "columns expanded": partial(_expanded, dim=-1),
    "negated": _negated,
}


def _values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mlp(action: bool, norm: bool) -> Case:
    sizes = {"x": (7, 5), "w_in": (6, 5), "b_in": (6,), "w_out": (5, 6), "b_out": (5,)}
    sizes |= {"norm_weight": (5,), "norm_bias": (5,)} if norm else {}
    sizes |= {"action": (3, 4), "w_action": (6, 4)} if action else {}
    tensors = {name: _values(*shape, seed=i) for i, (name, shape) in enumerate(sizes.items())}
    if action:
        tensors["cu_seqlens"] = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    return Case(partial(conditioned_mlp, residual=norm), tensors, ("cu_seqlens",))


def _loss(indexed: bool) -> Case:
    tensors = {"pred": _values(6, 5, seed=0), "target": _values(6, 5, seed=1)}
    if indexed:
        tensors["index"] = torch.tensor([5, 0, 3, 3, 1, 0])
    return Case(partial(stopgrad_l2, normalize_target=True), tensors)


def _norm(branch: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return residual_norm(x, branch, weight, bias, **options)


def _residual(branch: bool) -> Case:
    tensors = {"x": _values(6, 5, seed=0), "weight": _values(5, seed=1), "bias": _values(5, seed=2)}
    if branch:
        return Case(_norm, tensors | {"branch": _values(6, 5, seed=3)})
    return Case(partial(_norm, None), tensors)


def _images(images: Tensor, scale: Tensor, shift: Tensor, **options: Any) -> Tensor:
    return patchify(images, 2, scale, shift, dtype=torch.promote_types(scale.dtype, torch.float32), **options)


def _patches(indexed: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "images": torch.randint(0, 256, (3, 6, 6, 3), dtype=torch.uint8, generator=generator),
        "scale": _values(12, seed=1),
        "shift": _values(12, seed=2),
    }
    if indexed:
        tensors |= {"patches": torch.tensor([8, 0, 3, 3]), "image_of_token": torch.tensor([2, 0, 1, 2])}
    return Case(_images, tensors)


def _input(masked: bool) -> Case:
    tensors = {
        "context": _values(3, 5, seed=0),
        "context_patches": torch.tensor([3, 0, 2]),
        "position": _values(4, 5, seed=1),
        "rows": _values(2, 5, seed=2),
        "place": torch.tensor([6, 0, 3, 1, 5, 2, 4] if masked else [4, 0, 3, 1, 2]),
    }
    if masked:
        tensors |= {"mask_token": _values(5, seed=3), "predicted_patches": torch.tensor([1, 3])}
    return Case(predictor_input, tensors, ("place",))


def _e4m3(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    codes, scale = e4m3_rows(x.detach(), activation="gelu", **options)
    return codes.view(torch.uint8), scale


def _sigreg(p: Tensor, **options: Any) -> Tensor:
    return sigreg_sums(p.to(torch.promote_types(p.dtype, torch.float32)), spacing=0.375, knots=3, **options)


def _rows(x: Tensor, order: Tensor, rank: Tensor, backend: str) -> Tensor:
    del backend  # it has one
    return take_rows(x, order, rank)


def _permuted() -> Case:
    order, rank = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
    return Case(_rows, {"x": _values(4, 5, seed=0), "order": order, "rank": rank}, ("order", "rank"))


CASES = {
    "conditioned_mlp": partial(_mlp, action=True, norm=True),
    "conditioned_mlp without action": partial(_mlp, action=False, norm=True),
    "conditioned_mlp without norm": partial(_mlp, action=True, norm=False),
    "conditioned_mlp without either": partial(_mlp, action=False, norm=False),
    "stopgrad_l2": partial(_loss, indexed=True),
    "stopgrad_l2 row by row": partial(_loss, indexed=False),
    "residual_norm": partial(_residual, branch=True),
    "residual_norm without a branch": partial(_residual, branch=False),
    "patchify": partial(_patches, indexed=True),
    "patchify of all": partial(_patches, indexed=False),
    "predictor_input": partial(_input, masked=True),
    "predictor_input without mask tokens": partial(_input, masked=False),
    "e4m3_rows": lambda: Case(_e4m3, {"x": _values(6, 5, seed=0)}),
    "sigreg_sums": lambda: Case(_sigreg, {"p": _values(6, 5, seed=0), "rows": torch.tensor([4])}, ("rows",)),
    "take_rows": _permuted,
}
# Operators that cast their floating arguments to autocast's dtype; the others compute as without it.
CAST = ("conditioned_mlp", "residual_norm", "predictor_input")
_UNTOUCHED = {"target", "position", "images", "scale", "shift"}  # get no gradient whatever they require


def outcome(
    case: Case,
    tensors: dict[str, Tensor],
    incoming: Callable[[Tensor], Tensor] = lambda t: t,
    *,
    forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> dict[str, Tensor]:
    """Return results and gradients by name; `incoming` lays out the upstream gradients in memory.

    forward, backward: contexts of the two passes.
    """
    leaves = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    with forward():
        results = case.call(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    found = {f"result {i}": result.detach() for i, result in enumerate(results)}
    made = [result for result in results if result.requires_grad]
    if made:
        names = [name for name, t in leaves.items() if t.requires_grad and name not in _UNTOUCHED]
        upstream = [
            incoming(_values(*r.shape, seed=9 + i).to(r)) if r.dim() else r.detach() for i, r in enumerate(made)
        ]
        with backward():
            grads = torch.autograd.grad(made, [leaves[name] for name in names], upstream)
        found |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return found


def check_layout(case: Case, view: str, turned: Collection[str], dtype: torch.dtype, device: str, backend: str) -> None:
    """Require equal results for views and for contiguous copies; `turned`: arguments, and "incoming" for gradients.

    Sums of the same values in the same order: only a library's matmul may choose another order, which fp32 shows in its
    last bits and bf16 after a rounding.
    """
    given = {k: t.to(device, dtype if t.is_floating_point() else t.dtype) for k, t in case.tensors.items()}
    kept = case.distinct if view.endswith("expanded") else ()
    views = {k: VIEWS[view](t) if k in turned and k not in kept else t for k, t in given.items()}
    pieces = {k: _in_one_piece(t) for k, t in views.items()}
    lay = VIEWS[view] if "incoming" in turned else _in_one_piece
    found = outcome(case, views, lay, backend=backend)
    expected = outcome(case, pieces, lambda t: _in_one_piece(lay(t)), backend=backend)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **rounding, msg=lambda said, name=name: f"{name}: {said}")


def check_autocast(name: str, device: str, backend: str) -> None:
    """Require the documented rule, bit for bit: arguments cast before, and no effect of autocast in either pass.

    PyTorch's own operators differ in the latter: their backward passes run under the autocast of `backward`.
    """
    case = CASES[name]()
    tensors = {k: t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for k, t in case.tensors.items()}
    autocast = partial(torch.autocast, device, torch.bfloat16)
    plain, cast = outcome(case, tensors, backend=backend), case
    if name.startswith(CAST):

        def call(**given: Any) -> Any:
            return case.call(**{k: t.bfloat16() if _is_float(t) else t for k, t in given.items()})

        cast = Case(call, tensors)
    rule = outcome(cast, tensors, backend=backend)
    for inside, expected in (({"forward": autocast}, rule), ({"backward": autocast}, plain)):
        for extra in ({}, {"backward": autocast}):
            found = outcome(case, tensors, backend=backend, **(inside | extra))
            for key, value in expected.items():
                assert found[key].dtype == value.dtype, (key, inside, extra)
                assert torch.equal(found[key], value), (key, inside, extra)
    if backend == "reference":
        exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        within = outcome(case, exact, backend=backend, forward=autocast, backward=autocast)
        for key, value in outcome(case, exact, backend=backend).items():
            assert torch.equal(within[key], value), key


def check_compiled_autocast(name: str, device: str, backend: str) -> None:
    """Require that a compiled graph, called under autocast, gives eager's result.

    With Triton's operators also in the backward pass: PyTorch's own ends with an error about dtypes.
    """
    case = CASES[name]()
    tensors = {k: t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for k, t in case.tensors.items()}
    compiled = Case(torch.compile(case.call, backend="aot_eager", fullgraph=True), tensors)
    autocast = partial(torch.autocast, device, torch.bfloat16)
    for passes in ({"forward": autocast}, {"backward": autocast})[: 2 if backend == "triton" else 1]:
        found, expected = (outcome(one, tensors, backend=backend, **passes) for one in (compiled, case))
        for key, value in expected.items():
            assert found[key].dtype == value.dtype, (key, passes)
            torch.testing.assert_close(found[key], value, msg=lambda said, key=key: f"{key}: {said}")


def check_second_derivatives(name: str, device: str, backend: str) -> None:
    """Require right second derivatives, by finite differences in float64, or an error that says there are none."""
    case = CASES[name]()
    dtype = torch.float64 if backend == "reference" else torch.float32
    given = {k: t.to(device, dtype if t.is_floating_point() else t.dtype) for k, t in case.tensors.items()}
    leaves = {k: t.requires_grad_() for k, t in given.items() if t.is_floating_point() and k not in _UNTOUCHED}

    def differentiated(*tensors: Tensor) -> list[Tensor]:
        results = case.call(**(given | dict(zip(leaves, tensors, strict=True))), backend=backend)
        return [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]

    made = differentiated(*leaves.values())
    if not made:
        return
    try:
        # Upstream gradients that are constants, as a loss's is: the second derivative then has no other path.
        grads = torch.autograd.grad([r.sum() for r in made], leaves.values(), create_graph=True)
        torch.stack([grad.square().sum() for grad in grads] + [leaf.sum() for leaf in leaves.values()]).sum().backward()
    except RuntimeError as error:
        if not re.search("differentiable once|no autograd formula", str(error)):
            raise
    else:
        exact = name.removesuffix(" without mask tokens") in {"take_rows", "predictor_input"}  # linear
        assert exact or backend == "reference"
        if backend == "reference":
            assert torch.autograd.gradgradcheck(differentiated, tuple(leaves.values()), fast_mode=True)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_one_piece(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)
