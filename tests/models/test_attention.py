"""Packed attention equals each image's own attention."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.models import attention, attention_operators, measured_attention
from iwm_fast.models.attention import (
    BACKENDS,
    Attention,
    choose_backend,
    describe_attention,
    packed_attention,
    packed_qkv_attention,
    require_attention,
    resolve_backend,
)
from iwm_fast.models.measured_attention import attention_key, table_entry, torch_minor
from iwm_fast.models.packing import Segments


def draw_qkv(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return three views of one (N, 3, 2, 5) tensor, as in the model."""
    torch.manual_seed(tokens)
    return list(torch.randn(tokens, 3, 2, 5, dtype=dtype).requires_grad_().unbind(1))


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=7))
@settings(deadline=None, max_examples=40)
def test_equals_each_image_for_itself(plain: SimpleNamespace, lengths: list[int]) -> None:
    q, k, v = draw_qkv(sum(lengths))
    ours = packed_attention(q, k, v, Segments.from_lengths(lengths), "sdpa")
    assert ours.shape == q.shape
    images = zip(*(part.split(lengths) for part in (q, k, v)), strict=True)
    theirs = torch.cat([plain.attention(*image) for image in images if len(image[0])] or [v])
    torch.testing.assert_close(ours, theirs)
    if sum(lengths):
        weight = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad((ours * weight).sum(), (q, k, v), retain_graph=True),
            torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [[3, 1, 6, 3], [4, 4, 4], [5, 0, 2]], ids=["ragged", "equal", "with an empty one"])
def test_equals_sdpa_with_the_mask_that_xformers_would_use(lengths: list[int]) -> None:
    pytest.importorskip("xformers.ops")
    q, k, v = (part.detach() for part in draw_qkv(sum(lengths)))
    segments = Segments.from_lengths(lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = segments.block_diagonal_mask.materialize((sum(lengths), sum(lengths)), dtype=torch.float64)
    heads_first = (part.transpose(0, 1) for part in (q, k, v))
    dense = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(packed_attention(q, k, v, segments, "sdpa"), dense)


def test_xformers_gets_one_packed_row_and_the_mask_of_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers.ops")
    seen = {}

    def operator(q: Tensor, k: Tensor, v: Tensor, attn_bias: object) -> Tensor:
        seen.update(shape=q.shape, bias=attn_bias)
        return v

    monkeypatch.setattr(attention, "_xformers", lambda: SimpleNamespace(memory_efficient_attention=operator))
    segments = Segments.from_lengths([2, 0, 3])
    q, k, v = draw_qkv(5)
    assert packed_attention(q, k, v, segments, "xformers").shape == v.shape
    assert seen["shape"] == (1, 5, 2, 5)
    assert seen["bias"] is segments.block_diagonal_mask
    assert seen["bias"].q_seqinfo.seqstart_py == [0, 2, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    """On the CPU matmuls and softmax are fp32, so the result is exact for the given inputs."""
    q, k, v = (part.detach() for part in draw_qkv(9, dtype))
    segments = Segments.from_lengths([4, 5])
    exact = packed_attention(q.double(), k.double(), v.double(), segments, "sdpa")
    torch.testing.assert_close(packed_attention(q, k, v, segments, "sdpa"), exact.to(dtype), rtol=0, atol=2e-7)


def test_segments_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="segments have 4 tokens"):
        packed_attention(*draw_qkv(5), Segments.from_lengths([2, 2]), "sdpa")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'flash'"):
        packed_attention(*draw_qkv(5), Segments.from_lengths([5]), "flash")
    with pytest.raises(ValueError, match="requested is 'flash'"):
        resolve_backend("flash", "cpu")


def test_the_backend_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = resolve_backend.__wrapped__
    monkeypatch.setattr(attention, "_xformers", object)
    assert resolve("auto", "cpu") == "sdpa"
    assert resolve("auto", "cuda") == "xformers"
    assert resolve("sdpa", "cuda") == "sdpa"
    assert resolve("efficient", "cuda") == "efficient"
    for requested in ("xformers", "efficient"):
        with pytest.raises(UserError, match=f"{requested}, which has no operator for cpu"):
            resolve(requested, "cpu")
    monkeypatch.setattr(attention, "_xformers", lambda: None)
    assert resolve("auto", "cuda") == "efficient"  # grouped SDPA would be a call for each length
    with pytest.raises(UserError, match="not installed"):
        resolve("xformers", "cuda")


class Packed:
    """PyTorch's memory-efficient attention on the CPU, where it has no kernel: records `Attend` and its gradients."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = [n for n in lengths if n]
        self.gradients: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        bias, first, *sizes = rest
        longest = max(self.lengths)
        assert first.tolist() == [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        assert bias is None
        assert sizes[1:5] == [longest, longest, 0.0, 0]
        out = packed_attention(q[0], k[0], v[0], Segments.from_lengths(self.lengths), "sdpa")
        return (out[None], *torch.zeros(3, 1), torch.zeros(1), torch.zeros(1))

    def backward(self, grad: Tensor, *given: Any, shared_storage_dqdkdv: bool) -> tuple[Tensor, ...]:
        assert shared_storage_dqdkdv
        leaves = [part[0].detach().requires_grad_() for part in given[:3]]
        with torch.enable_grad():
            out = packed_attention(*leaves, Segments.from_lengths(self.lengths), "sdpa")
        found = torch.autograd.grad(out, leaves, grad[0])
        self.gradients = torch.empty(1, len(grad[0]), 3, *grad.shape[2:], dtype=grad.dtype)
        for place, part in enumerate(found):
            self.gradients[:, :, place] = part
        return (*self.gradients.unbind(2), torch.empty(0))


@pytest.mark.parametrize("lengths", [[3, 1, 6, 3], [4, 4, 4], [5, 0, 2]], ids=["ragged", "equal", "with an empty one"])
@pytest.mark.parametrize(("backend", "dtype"), [("efficient", torch.float64), ("xformers", torch.float32)], ids=str)
def test_the_gradients_of_queries_keys_and_values_are_one_tensor_that_nobody_copied(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], backend: str, dtype: torch.dtype
) -> None:
    operators = Packed(lengths)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", operators.forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", operators.backward)
    segments = Segments.from_lengths(lengths)
    qkv = torch.randn(sum(lengths), 3, 2, 5, dtype=dtype, requires_grad=True)
    out = packed_qkv_attention(qkv, segments, backend)
    plain = packed_qkv_attention(qkv, segments, "sdpa")
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    upstream = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(plain, qkv, upstream)
    (found,) = torch.autograd.grad(out, qkv, upstream)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert operators.gradients is not None
    assert found.data_ptr() == operators.gradients.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(packed_qkv_attention(qkv, segments, backend), plain, rtol=0, atol=0)


def test_a_packed_tensor_of_another_batch_is_refused() -> None:
    qkv = torch.randn(5, 3, 2, 5, requires_grad=True)
    for backend in ("efficient", "xformers", "sdpa"):
        with pytest.raises(ValueError, match="segments have 4 tokens"):
            packed_qkv_attention(qkv, Segments.from_lengths([2, 2]), backend)


MADE = [[3, 1, 6, 3], [4, 4, 4], [5, 0, 2, 0], [1, 1], [1]]


def exact_with_a_mask(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Attention over all scores, with other images' at minus infinity."""
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(image[:, None] != image, -torch.inf).softmax(-1), v)


def assert_equals_the_masked(lengths: list[int], attend: Callable[..., Tensor]) -> None:
    parts = draw_qkv(sum(lengths))
    ours, theirs = attend(*parts, Segments.from_lengths(lengths)), exact_with_a_mask(*parts, lengths)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(out, parts, upstream) for out in (ours, theirs))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("lengths", MADE, ids=str)
def test_grouped_sdpa_has_the_results_and_gradients_of_a_mask(lengths: list[int]) -> None:
    assert_equals_the_masked(lengths, lambda *given: packed_attention(*given, "sdpa"))


@pytest.mark.parametrize("lengths", MADE, ids=str)
def test_cudnn_is_called_for_each_length_but_one(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """With PyTorch's formula in place of cuDNN, which needs a GPU."""
    asked = []

    def kernel(backend: attention.SDPBackend) -> object:
        asked.append(backend)
        return torch.nn.attention.sdpa_kernel(attention.SDPBackend.MATH)

    monkeypatch.setattr(attention, "sdpa_kernel", kernel)
    assert_equals_the_masked(lengths, lambda *given: packed_attention(*given, "cudnn"))
    assert asked == [attention.SDPBackend.CUDNN_ATTENTION] * len({n for n in lengths if n > 1})


class _Library:
    """Stands in for a library's function over packed sequences, with the libraries' argument names."""

    def __init__(self, *, pair: bool) -> None:
        self.pair, self.seen = pair, []

    def varlen_attn(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        return self.flash_attn_varlen_func(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)[0]

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, deterministic: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert min(lengths) > 0
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        self.seen.append(deterministic)
        out = exact_with_a_mask(q, k, v, lengths)
        return (out, out) if self.pair or not deterministic else out


@pytest.mark.parametrize("lengths", MADE, ids=str)
@pytest.mark.parametrize("name", attention_operators.OPERATORS)
def test_a_library_gets_the_bounds_of_images_that_have_tokens(
    monkeypatch: pytest.MonkeyPatch, name: str, lengths: list[int]
) -> None:
    library = _Library(pair=True)
    monkeypatch.setattr(attention_operators, "library", lambda _, function: getattr(library, function))
    assert_equals_the_masked(lengths, lambda *given: packed_attention(*given, name))
    assert library.seen == [False]


@pytest.mark.parametrize("name", ["flash3", "flash_cute"])
def test_a_library_gets_the_flag_for_a_deterministic_backward_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = _Library(pair=False)
    monkeypatch.setattr(attention_operators, "library", lambda _, function: getattr(library, function))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert_equals_the_masked([2, 3], lambda *given: packed_attention(*given, name))
    assert library.seen == [True]


def test_pytorchs_function_takes_what_it_is_given() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = inspect.signature(_Library(pair=True).varlen_attn).parameters
    assert list(inspect.signature(varlen.varlen_attn).parameters)[: len(names)] == list(names)


def test_xformers_takes_the_operators_that_are_deterministic_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers.ops")
    seen = {}

    def operator(q: Tensor, k: Tensor, v: Tensor, **named: object) -> Tensor:
        seen.update(named)
        return v

    cutlass = SimpleNamespace(FwOp="cutlass forward", BwOp="cutlass backward")
    fake = SimpleNamespace(memory_efficient_attention=operator, fmha=SimpleNamespace(cutlass=cutlass))
    monkeypatch.setattr(attention, "_xformers", lambda: fake)
    for asked in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda asked=asked: asked)
        packed_attention(*draw_qkv(5), Segments.from_lengths([2, 3]), "xformers")
        assert ("op" in seen) == asked
    assert seen["op"] == ("cutlass forward", "cutlass backward")


GPU = torch.device("cuda", 0)
RAGGED = Segments.from_lengths([60, 90, 100, 0])


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, object]], None]:
    """Simulate a GPU as far as choosing goes, with xformers and all libraries except flash-attn 3 and a given table."""
    monkeypatch.setattr(attention, "_xformers", object)
    found = {"flash3": None}
    modules = {operator.module: name for name, operator in attention_operators.OPERATORS.items()}
    monkeypatch.setattr(attention_operators, "library", lambda module, _: found.get(modules[module], object))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(attention, "resolve_backend", resolve_backend.__wrapped__)

    def give(table: dict[str, object]) -> None:
        monkeypatch.setattr(measured_attention, "_table", lambda _: table)

    give({})
    return give


def chosen(
    requested: str = "auto",
    segments: Segments = RAGGED,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: int = 12,
    gradients: bool = True,
) -> str:
    return choose_backend(requested, GPU, segments, heads, 64, dtype, gradients=gradients)


def entry(choice: str, tokens: int = 300, **other: object) -> dict[str, object]:
    key = attention_key(RAGGED, 12, 64, torch.bfloat16, gradients=True)
    return {key: {"choice": choice, "tokens": tokens, "torch": torch_minor(), "seconds": {}, **other}}


@pytest.mark.parametrize("name", ["xformers", "efficient", "sdpa", "cudnn", "varlen", "flash_cute"])
def test_auto_takes_what_was_measured_for_such_a_batch_on_this_gpu(on_a_gpu: Callable[..., None], name: str) -> None:
    assert chosen() == "xformers"
    assert describe_attention("auto", GPU) == "xformers (no measurements of this GPU)"
    on_a_gpu(entry(name))
    assert chosen() == name
    assert describe_attention("auto", GPU) == f"xformers, or by measurements of this GPU {name}"
    assert chosen("sdpa") == "sdpa"


def test_auto_takes_xformers_where_nothing_like_the_batch_was_measured(
    on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(entry("varlen"))
    equal = Segments.from_lengths([84] * 3)
    others = [
        chosen(gradients=False),
        chosen(dtype=torch.float16),
        chosen(heads=16),
        chosen(segments=equal),
        chosen(segments=Segments.from_lengths([300, 299])),
    ]
    on_a_gpu(entry("varlen", tokens=501))
    others.append(chosen())
    on_a_gpu(entry("varlen", torch="2.1"))
    others.append(chosen())
    on_a_gpu(entry("flash3"))  # not installed here
    others.append(chosen())
    on_a_gpu(entry("an operator of a later version"))
    others.append(chosen())
    assert others == ["xformers"] * len(others)
    on_a_gpu(entry("varlen"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [chosen(), chosen("xformers"), chosen("varlen")] == ["efficient", "xformers", "varlen"]


def test_what_computes_halves_alone_leaves_fp32_to_auto_and_no_training_of_it_begins(
    on_a_gpu: Callable[..., None],
) -> None:
    del on_a_gpu
    for name in ("cudnn", "varlen", "flash_cute"):
        assert chosen(name) == name
        assert chosen(name, dtype=torch.float32) == "xformers"
        require_attention(name, "cuda", "bf16")
        with pytest.raises(UserError, match=f"model.attention is {name}, which computes in bf16 or fp16, and train"):
            require_attention(name, "cuda", "fp32")


def test_why_an_operator_cannot_be_had_is_said(on_a_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    del on_a_gpu
    with pytest.raises(UserError, match=r"needs flash-attn 3 \(.*\), which is not installed: install it, or use auto"):
        chosen("flash3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(UserError, match=r"flash_cute, which needs a GPU of .* 9\.0; this one has 8\.6: use"):
        chosen("flash_cute")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(UserError, match="cudnn, which needs cuDNN"):
        chosen("cudnn")
    for name in set(BACKENDS) - {"sdpa"}:
        with pytest.raises(UserError, match=f"model.attention is {name}, which has no operator for cpu: use auto"):
            resolve_backend.__wrapped__(name, "cpu")


def test_blocks_are_given_sorted_images_where_the_choice_takes_them_by_length(on_a_gpu: Callable[..., None]) -> None:
    del on_a_gpu
    with torch.device("meta"):
        modules = {name: Attention(32, 2, name) for name in ("auto", "sdpa")}
    assert all(module.wants_groups(RAGGED) for module in modules.values())  # no GPU: by length
    assert Attention(32, 2).wants_groups(RAGGED)


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ({"xformers": 1.0, "varlen": 0.97, "cudnn": 0.99}, "varlen"),
        ({"xformers": 1.0, "varlen": 0.985, "cudnn": 3.0}, "xformers"),
        ({"xformers": 1.0}, "xformers"),
        ({"varlen": 2.0, "cudnn": 1.0}, "cudnn"),
    ],
)
def test_an_entry_chooses_the_fastest_and_xformers_where_equal(seconds: dict[str, float], choice: str) -> None:
    assert table_entry(seconds, 100) == {
        "choice": choice, "tokens": 100, "torch": torch_minor(), "seconds": seconds
    }  # fmt: skip


def test_asking_for_the_order_of_images_reads_no_parameter_by_its_name() -> None:
    """At ZeRO stage 3 DeepSpeed gathers parameters read by name, and only ranks with unsorted images would."""

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    layer = attention.Attention(8, 2)
    layer.qkv._parameters = Watched(layer.qkv._parameters)
    assert layer.wants_groups(Segments.from_lengths([3, 5], torch.device("cpu")))
