"""What Triton compiles each kernel for does not depend on a step's number of rows, by Triton's own specialisation."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import pytest
import torch

from iwm_fast.kernels import TRITON_FUNCTIONS
from iwm_fast.kernels._aot.launches import record_launches, recording, specialise
from iwm_fast.kernels._lib.compiled import triton_functions
from iwm_fast.kernels._lib.norms import norm_backward, normalise
from iwm_fast.kernels._mlp import passes
from iwm_fast.kernels._tuning.candidates import candidates_of, possible
from iwm_fast.kernels._tuning.tuner import use_tuner
from iwm_fast.kernels.e4m3_rows import launch_e4m3
from iwm_fast.kernels.patchify import launch_patchify
from iwm_fast.kernels.predictor_input import launch_assembly, launch_assembly_backward
from iwm_fast.kernels.rope import launch_rope
from iwm_fast.kernels.stopgrad_l2 import launch_distance, launch_total

ARCHITECTURE = "sm_90"
WIDTH, HIDDEN = 384, 1536
# 1, powers of two and their neighbours, primes, multiples of 16 and of 128 that are not powers, a real step's.
ROWS = (1, 2, 15, 16, 17, 48, 97, 127, 128, 1009, 4096, 4099, 50_176, 100_353)


def empty(*shape, kind=torch.bfloat16):
    return torch.empty(*shape, dtype=kind, device="meta")


def indices(rows, kind=torch.int64):
    """A part of a packed upload: it starts at a multiple of 16 bytes or not, depending on its neighbours' lengths."""
    before = rows % 3
    return empty(rows + before, kind=kind)[before:]


def mlp(rows, actions=16, images=None, norm=True, backward=True, workspace=2**30):
    images = images or 1 + rows % 33
    bounds = indices(images + 1, torch.int32) if actions else None
    action = (empty(images, actions), empty(HIDDEN, actions)) if actions else (None, None)
    affine = (empty(WIDTH), empty(WIDTH)) if norm else (None, None)
    inputs = (
        empty(rows, WIDTH), empty(HIDDEN, WIDTH), empty(HIDDEN), empty(WIDTH, HIDDEN), empty(WIDTH),
        *action, bounds, *affine, norm, 1e-6, "gelu", workspace,
    )  # fmt: skip
    passes.forward(*inputs)
    if backward:
        passes.backward(empty(rows, WIDTH), *inputs, True)


def norm(rows):
    x, row = empty(rows, WIDTH), empty(WIDTH)
    normalise(x, row, row, 1e-6, branch=x, total=x)
    norm_backward(x, x, row, x, x, 1e-6)


def distance(rows):
    targets, wanted = empty(rows + rows % 7, WIDTH), indices(rows)
    sums = empty(rows, kind=torch.float32)
    launch_distance(empty(rows, WIDTH), targets, wanted, True, 1.0 / rows, 1e-6, sums=sums, grad=empty(rows, WIDTH))
    launch_distance(
        empty(rows, WIDTH), targets, wanted, True, 1.0 / rows, 1e-6, grad=empty(rows, WIDTH),
        incoming=empty(1, kind=torch.float32), skip_one=True,
    )  # fmt: skip
    launch_total(sums, 1.0 / rows, empty(1, kind=torch.float32))


def assembly(rows):
    context, masked = empty(rows, WIDTH), 1 + rows // 2
    place, out = indices(rows + masked), empty(rows + masked, WIDTH)
    launch_assembly(
        context, indices(rows), empty(196, WIDTH), place, empty(WIDTH), indices(masked), None, out
    )  # fmt: skip
    launch_assembly_backward(out, place, context, empty(0, WIDTH), masked)


def patches(rows, patch=16):
    images = empty(1 + rows // 8, 224, 224, 3, kind=torch.uint8)
    table, out = empty(768, kind=torch.float32), empty(rows, 768)
    launch_patchify(images, indices(rows), indices(rows), table, table, patch, out)


def codes(rows):
    launch_e4m3(
        empty(rows, WIDTH), "gelu", empty(rows, WIDTH, kind=torch.uint8), empty(rows, 1, kind=torch.float32)
    )  # fmt: skip


def rotation(rows):
    qkv, table = empty(rows, 3, 12, 64), empty(196, 64, kind=torch.float32)
    launch_rope(qkv[:, 0], qkv[:, 1], None, table, indices(rows), qkv, inverse=False)
    launch_rope(*(empty(rows, 12, 64) for _ in range(3)), table, indices(rows), qkv, inverse=True)


WORKS = {
    "MLP with an action": mlp,
    "MLP with an action of its own multiply": partial(mlp, actions=24),
    "MLP without an action": partial(mlp, actions=0),
    "MLP without normalisation": partial(mlp, norm=False),
    "normalisation": norm,
    "distance": distance,
    "predictor's input": assembly,
    "patches": patches,
    "rows in e4m3": codes,
    "rotation": rotation,
}


class Every:
    """Replaces the tuner: every candidate in turn."""

    def run(self, product, dtype, _, call, about):
        found = [c for c in candidates_of(ARCHITECTURE, product) if possible(c, ARCHITECTURE, dtype.itemsize, about)]
        return [call(choice) for choice in found][-1]


def compiled_for(work, arch=ARCHITECTURE):
    """Return everything that Triton would compile each kernel for: the keys of its launcher's cache."""
    found = defaultdict(set)

    def record(kernel, given):
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        found[kernel.__name__].add((str(specialise(kernel, given, arch)), str(options)))

    with recording(record), use_tuner(Every()):
        work()
    return dict(found)


@pytest.mark.parametrize("name", WORKS)
def test_no_number_of_rows_compiles_anything_that_another_has_not(name):
    work = WORKS[name]
    first = compiled_for(partial(work, 1000))
    assert first
    for rows in ROWS:
        assert compiled_for(partial(work, rows)) == first, rows


def test_a_single_row_with_any_stride_is_a_row_like_others():
    """A column of a matrix as a row: PyTorch reports the matrix's stride for it."""
    x = empty(WIDTH, 1).t()
    assert x.stride() != (WIDTH, 1)

    def work(x):
        row = empty(HIDDEN, WIDTH), empty(HIDDEN), empty(WIDTH, HIDDEN), empty(WIDTH)
        passes.forward(x, *row, None, None, None, empty(WIDTH), empty(WIDTH), True, 1e-6, "gelu", 2**30)

    assert compiled_for(partial(work, x)) == compiled_for(partial(work, empty(1000, WIDTH)))


def test_chunks_compile_the_same_for_any_number_of_rows():
    chunked = partial(mlp, workspace=2**20)
    first = compiled_for(partial(chunked, 1000))
    for rows in (641, 1024, 4099):
        assert compiled_for(partial(chunked, rows)) == first, rows


@pytest.mark.parametrize(
    "name", [*("MLP with an action", "normalisation", "distance"), "predictor's input", "patches", "rotation"]
)
def test_what_runs_is_what_was_compiled_ahead_of_time(ahead_of_time, name):
    for kernel, variants in compiled_for(partial(WORKS[name], 1009)).items():
        assert variants <= ahead_of_time[kernel], kernel


@pytest.fixture(scope="module")
def ahead_of_time():
    found = defaultdict(set)
    for launch in record_launches(ARCHITECTURE):
        known = specialise(launch.kernel, launch.arguments, ARCHITECTURE)
        found[launch.kernel.__name__].add((str(known), str(launch.options)))
    return found


@pytest.mark.parametrize("name", TRITON_FUNCTIONS)
def test_what_is_excepted_is_an_argument_and_no_constant(name):
    """Triton ignores names that are not arguments."""
    kernel = triton_functions()[name]
    excepted = {p.name for p in kernel.params if p.do_not_specialize}
    assert excepted == set(kernel.do_not_specialize)
    assert not any(p.is_constexpr for p in kernel.params if p.name in excepted)


def test_widths_and_pointers_of_tokens_are_still_known_to_divide_by_16():
    """16-byte loads depend on it."""
    seen = set()

    def record(kernel, given):
        known = dict(zip(kernel.arg_names, specialise(kernel, given, ARCHITECTURE), strict=True))
        wanted = {
            "linear_kernel": ("M", "K", "stride_xn", "stride_on", "bias_ptr"),
            "hidden_backward_kernel": ("H", "D", "DO", "stride_xn", "stride_dn", "stride_hn", "bias_ptr"),
            "weight_grad_kernel": ("P", "Q", "stride_an", "stride_bn", "out_ptr"),
            "norm_kernel": ("D", "x_ptr", "out_ptr", "weight_ptr", "stride_xn", "stride_on"),
            "norm_backward_kernel": ("D", "x_ptr", "dnormed_ptr", "dx_ptr", "sums_ptr", "stride_xn", "stride_dn"),
            "segment_sum_kernel": ("M", "x_ptr", "out_ptr", "stride_xn"),
            "add_slices_kernel": ("L", "SPLIT", "slices_ptr", "out_ptr"),
            "distance_kernel": ("D", "pred_ptr", "target_ptr", "grad_ptr", "stride_pn", "stride_tm", "stride_gn"),
            "assemble_kernel": ("D", "context_ptr", "position_ptr", "out_ptr", "stride_cn", "stride_pl", "stride_on"),
            "assemble_backward_kernel": ("D", "dout_ptr", "dcontext_ptr", "stride_gn", "stride_cn"),
            "patchify_kernel": ("images_ptr", "out_ptr", "stride_xb", "stride_xy", "stride_on"),
            "e4m3_kernel": ("D", "x_ptr", "code_ptr", "stride_xn", "stride_cn"),
        }.get(kernel.__name__, ())
        seen.add(kernel.__name__)
        for name in wanted:
            if known[name] != ("constexpr", None):
                assert known[name][1] == "D", (kernel.__name__, name, known[name])

    with recording(record), use_tuner(Every()):
        for work in WORKS.values():
            work(1009)
    assert len(seen) >= 15
