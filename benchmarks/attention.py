"""Attention over packed images at the step's own lengths: ours beside every other way that is installed.

    python -m benchmarks.attention --json FILE [--device cuda|cpu] [--rounds 15] [--dtype bf16|fp32] [--only WORDS]

Lengths are those of the masks that training draws: the context encoder's, the target's, the predictor's. All compute
the same from one packed tensor of q, k and v, (N, 3, heads, d), on the CPU in ascending order of length, as the model
has them there, and give one gradient of it; what a contender has to do to them first (padding, a nested tensor, a mask)
or to its gradients last is its own time, what it can prepare from the lengths alone is not. Answers and gradients are
compared with float64 one image at a time before anything is timed, and the contenders take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iwm_fast.benchmarks.contenders import Skipped
from iwm_fast.benchmarks.timing import clocked, spread
from iwm_fast.commands.plan import tokens_of
from iwm_fast.config import load_config, packaged_config
from iwm_fast.errors import UserError
from iwm_fast.models.attention import packed_attention, packed_qkv_attention, resolve_backend
from iwm_fast.models.packing import Segments
from iwm_fast.outputs import require_result
from iwm_fast.planning.environment import installed_version
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["CASES", "CONTENDERS", "Case", "exact", "lengths_of", "measure"]

Attend = Callable[[Tensor], Tensor]
Apart = Callable[[Tensor, Tensor, Tensor], Tensor]
# ‖answer − float64‖ / ‖float64‖ above which a contender is not timed: some roundings of 2⁻⁸ and of 2⁻²³.
_WRONG = {torch.bfloat16: 0.03, torch.float32: 1e-4}
_SLOW_S, _SLOW_ROUNDS = 0.5, 3


@dataclass(frozen=True)
class Case:
    """One network's attention: `part` of the step of a packaged configuration, for so many images."""

    config: str
    part: str
    images: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.config} {self.part}, {self.images} images"


PARTS = ("context", "target", "predictor")
CASES = {
    "cuda": [Case("vit_base_p16_224_equi", part, 256) for part in PARTS]
    + [Case("vit_large_p16_224", part, 128) for part in PARTS],
    "cpu": [Case("vit_tiny_p8_96", part, 32) for part in PARTS] + [Case("vit_tiny_p4_32", part, 128) for part in PARTS],
}


def lengths_of(case: Case) -> tuple[list[int], int, int]:
    """Tokens of each image, heads, and numbers a head."""
    config = load_config(packaged_config(case.config), [])
    encoder, predictor = config.model.encoder_shape, config.model.predictor
    if case.part == "target":
        return [config.model.grid**2] * case.images, encoder.heads, encoder.width // encoder.heads
    tokens = tokens_of(config, case.images)
    if case.part == "context":
        return tokens.context.tolist(), encoder.heads, encoder.width // encoder.heads
    joined = tokens.context + tokens.predicted
    return joined.tolist(), predictor.head_count, predictor.width // predictor.head_count


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(q kᵀ / √d) v of each image by itself, by its formula."""
    outs = []
    for one_q, one_k, one_v in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(outs)


def apart(make: Callable[[Segments], Apart]) -> Callable[[Segments], Attend]:
    """A contender that takes q, k and v by themselves."""

    def made(segments: Segments) -> Attend:
        attend = make(segments)
        return lambda qkv: attend(*qkv.unbind(1))

    return made


@apart
def _exact(segments: Segments) -> Apart:
    return lambda q, k, v: exact(q, k, v, segments.lengths)


def _ours(segments: Segments) -> Attend:
    backend = resolve_backend("auto", segments.device.type)
    return lambda qkv: packed_qkv_attention(qkv, segments, backend)


def _by_image(segments: Segments) -> Apart:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(t.split(segments.lengths) for t in (q, k, v)), strict=True):
            dense = (part.transpose(0, 1)[None] for part in parts)
            outs.append(F.scaled_dot_product_attention(*dense)[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def _padded(segments: Segments) -> Apart:
    """Dense to the longest image, with a mask of the keys."""
    images, longest = len(segments.lengths), max(segments.lengths)
    real = torch.arange(longest) < torch.tensor(segments.lengths)[:, None]
    places = real.flatten().nonzero()[:, 0].to(segments.device)  # found on the host, which knows the lengths
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


def _varlen(segments: Segments) -> Apart:
    """Flash attention over packed sequences, as it comes with PyTorch."""
    _needs_gpu(segments)
    varlen: Any = import_module("torch.nn.attention.varlen")
    bounds, longest = segments.cu_seqlens, max(segments.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest)
        return out

    return attend


def _xformers(segments: Segments) -> Apart:
    _needs_gpu(segments)
    resolve_backend("xformers", "cuda")
    return lambda q, k, v: packed_attention(q, k, v, segments, "xformers")


def _efficient(segments: Segments) -> Attend:
    """PyTorch's memory-efficient attention, with one gradient of q, k and v."""
    _needs_gpu(segments)
    return lambda qkv: packed_qkv_attention(qkv, segments, "efficient")


def _needs_gpu(segments: Segments) -> None:
    if segments.device.type != "cuda":
        raise Skipped("needs a GPU")


CONTENDERS: dict[str, tuple[Callable[[Segments], Attend], str | None]] = {
    "iwm-fast": (_ours, installed_version("iwm-fast")),
    "an image at a time": (apart(_by_image), torch.__version__),
    "padded, masked": (apart(_padded), torch.__version__),
    "nested tensors": (apart(_nested), torch.__version__),
    "flex attention": (apart(_flex), torch.__version__),
    "flash varlen": (apart(_varlen), torch.__version__),
    "cudnn, padded": (apart(_cudnn), torch.__version__),
    "efficient, one gradient": (_efficient, torch.__version__),
    "xformers": (apart(_xformers), installed_version("xformers")),
}


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _call(attend: Attend, given: Tensor, upstream: Tensor, backward: bool) -> list[Tensor]:
    if not backward:
        with torch.no_grad():
            return [attend(given)]
    out = attend(given)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


def _parts(found: list[Tensor]) -> list[Tensor]:
    """The answer, and the gradients of q, k and v."""
    return [found[0], *(part for grad in found[1:] for part in grad.unbind(1))]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """A row a contender and pass: forward, then forward with all gradients."""
    lengths, heads, head = lengths_of(case)
    segments = Segments.from_lengths(sorted(lengths) if device.type == "cpu" else lengths, device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (segments.total, 3, heads, head)
    given = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.randn(given[:, 0].shape, generator=generator, device=device, dtype=torch.float64).to(dtype)
    wide = given.detach().double().requires_grad_()
    wanted = _parts(_call(_exact(segments), wide, upstream.double(), True))
    products = 4 * heads * head * sum(n * n for n in segments.lengths)
    about = {
        "case": case.name, "tokens": segments.total, "heads": heads, "head": head, "dtype": str(dtype)[6:],
        "shortest": min(lengths), "longest": max(lengths),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], Attend, bool]] = []
    for name, (make, version) in CONTENDERS.items():
        for backward in (False, True):
            row: dict[str, Any] = about | {"contender": name, "version": version, "backward": backward}
            rows.append(row)
            try:
                attend = make(segments)
                found = _call(attend, given, upstream, backward)
            except Skipped as reason:
                row["skipped"] = str(reason)
                continue
            except (RuntimeError, NotImplementedError, ValueError) as error:  # what a library says that it cannot do
                row["skipped"] = _first_line(error)
                continue
            worst = max(_relative(f, w) for f, w in zip(_parts(found), wanted, strict=False))
            row["error"] = worst
            if not worst <= _WRONG[dtype]:
                row["skipped"] = "its answers are wrong"
                continue
            row |= {"flops": products * (3 if backward else 1), "seconds": []}
            timed.append((row, attend, backward))
    _take_turns(timed, given, upstream, device, rounds)
    for row in rows:
        say(_line(row))
    return rows


def _take_turns(
    timed: list[tuple[dict[str, Any], Attend, bool]], given: Tensor, upstream: Tensor, device: torch.device,
    rounds: int,
) -> None:  # fmt: skip
    """Time all in turn; the first round does not count, and who is hopelessly slow has three more only."""
    for number in range(rounds + 1):
        for row, attend, backward in timed:
            slow = number > _SLOW_ROUNDS and median(row["seconds"]) > _SLOW_S
            if not slow:
                taken = clocked(lambda a=attend, b=backward: _call(a, given, upstream, b), device)  # type: ignore[misc]
                row["seconds"] += [taken.seconds] if number else []
    for row, _, _ in timed:
        row.update(spread(row["seconds"]))


def _line(row: dict[str, Any]) -> str:
    what = f"{row['case']} {row['contender']}{', with gradients' if row['backward'] else ''}"
    if "skipped" in row:
        return f"{what}: skipped: {row['skipped']}"
    times = [f"{row[key] * 1e3:.3f}" for key in ("p50", "p20", "p80")]
    return f"{what}: {times[0]} ms ({times[1]} – {times[2]}), error {row['error']:.0e}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write, or -")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name has these words")
    args = parser.parse_args()
    require_result(args.json)
    cases = [case for case in CASES[args.device] if args.only in case.name]
    if not cases:
        there = "; ".join(case.name for case in CASES[args.device])
        raise UserError(f"--only: {args.only}: no such case; there are {there}")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    say = partial(print, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    rows: list[dict[str, Any]] = []
    body = {"rows": rows, "device": args.device, "threads": torch.get_num_threads(), "command": sys.argv[1:]}
    for case in cases:
        rows += measure(case, torch.device(args.device), dtype, args.rounds, say)
        if args.json != "-":
            write_result(args.json, "attention", body)  # after each case: what is measured is kept
    if args.json == "-":
        write_result("-", "attention", body)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.attention", main))
