"""Implementations of attention over packed images: iwm-fast's, the other values of model.attention, and others.

Each is made for the segments of a batch, and raises `Skipped` if it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iwm_fast.benchmarks.baselines.skipped import Skipped
from iwm_fast.environment import installed_version
from iwm_fast.models.attention import choose_backend, packed_qkv_attention, unavailable
from iwm_fast.models.packing import Segments

__all__ = ["BACKEND_OF", "CONTENDERS", "Apart", "Attend", "apart", "by_formula", "exact"]

Attend = Callable[[Tensor], Tensor]
Apart = Callable[[Tensor, Tensor, Tensor], Tensor]


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return softmax(q kᵀ / √d) v of each image by itself, computed by its formula."""
    outs = []
    for one_q, one_k, one_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(outs)


def apart(make: Callable[[Segments], Apart]) -> Callable[[Segments], Attend]:
    """Adapt an implementation that takes q, k and v separately."""

    def made(segments: Segments) -> Attend:
        attend = make(segments)
        return lambda qkv: attend(*qkv.unbind(1))

    return made


@apart
def by_formula(segments: Segments) -> Apart:
    """`exact`, from one packed tensor."""
    return lambda q, k, v: exact(q, k, v, segments.lengths)


def _ours(segments: Segments) -> Attend:
    def attend(qkv: Tensor) -> Tensor:
        heads, head = qkv.shape[2:]
        chosen = choose_backend("auto", qkv.device, segments, heads, head, qkv.dtype, gradients=torch.is_grad_enabled())
        return packed_qkv_attention(qkv, segments, chosen)

    return attend


def _named(backend: str) -> Callable[[Segments], Attend]:
    """Return a value of model.attention."""

    def make(segments: Segments) -> Attend:
        reason = unavailable(backend, segments.device.type)
        if segments.device.type != "cuda":
            raise Skipped("needs a GPU" if reason else "iwm-fast's own choice on a CPU")
        if reason:
            raise Skipped(reason)
        return lambda qkv: packed_qkv_attention(qkv, segments, backend)

    return make


def _by_image(segments: Segments) -> Apart:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(t.split(segments.lengths) for t in (q, k, v)), strict=True):
            dense = (part.transpose(0, 1)[None] for part in parts)
            outs.append(F.scaled_dot_product_attention(*dense)[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def _padded(segments: Segments) -> Apart:
    """Dense attention, padded to the longest image, with a key mask."""
    images, longest = len(segments.lengths), max(segments.lengths)
    real = torch.arange(longest) < torch.tensor(segments.lengths)[:, None]
    places = real.flatten().nonzero()[:, 0].to(segments.device)  # on the host, which has the lengths: no sync
    real = real.to(segments.device)

    def dense(x: Tensor) -> Tensor:
        rows = x.new_zeros(images * longest, *x.shape[1:]).index_copy(0, places, x)
        return rows.view(images, longest, *x.shape[1:]).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(dense(q), dense(k), dense(v), attn_mask=real[:, None, None])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    return attend


def _cudnn(segments: Segments) -> Apart:
    _needs_gpu(segments)
    padded = _padded(segments)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return padded(q, k, v)

    return attend


def _nested(segments: Segments) -> Apart:
    offsets = segments.cu_seqlens.long()
    shortest, longest = min(segments.lengths), max(segments.lengths)

    def jagged(x: Tensor) -> Tensor:
        nested: Tensor = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        return nested.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v))
        values: Tensor = out.transpose(1, 2).values()
        return values

    return attend


def _flex(segments: Segments) -> Apart:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    image, total = segments.image_of_token, segments.total
    mask = create_block_mask(
        lambda _b, _h, i, j: image[i] == image[j], None, None, total, total, device=segments.device.type
    )
    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        out: Tensor = compiled(*dense, block_mask=mask)
        return out[0].transpose(0, 1)

    return attend


def _needs_gpu(segments: Segments) -> None:
    if segments.device.type != "cuda":
        raise Skipped("needs a GPU")


CONTENDERS: dict[str, tuple[Callable[[Segments], Attend], str | None]] = {
    "iwm-fast": (_ours, installed_version("iwm-fast")),
    "an image at a time": (apart(_by_image), torch.__version__),
    "padded, masked": (apart(_padded), torch.__version__),
    "nested tensors": (apart(_nested), torch.__version__),
    "flex attention": (apart(_flex), torch.__version__),
    "flash varlen": (_named("varlen"), torch.__version__),
    "cudnn, padded": (apart(_cudnn), torch.__version__),
    "cudnn by length": (_named("cudnn"), torch.__version__),
    "sdpa by length": (_named("sdpa"), torch.__version__),
    "efficient, one gradient": (_named("efficient"), torch.__version__),
    "xformers": (_named("xformers"), installed_version("xformers")),
    "flash-attn 3": (_named("flash3"), installed_version("flash-attn-3")),
    "flash-attn CuTe": (_named("flash_cute"), installed_version("flash-attn-4")),
}
# Those that are a value of model.attention.
BACKEND_OF = {
    "flash varlen": "varlen",
    "cudnn by length": "cudnn",
    "sdpa by length": "sdpa",
    "efficient, one gradient": "efficient",
    "xformers": "xformers",
    "flash-attn 3": "flash3",
    "flash-attn CuTe": "flash_cute",
}
