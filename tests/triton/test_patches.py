"""patchify on Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.config.schema import EncoderArchitecture, EncoderShape
from iwm_fast.kernels import patchify, patchify_flops, use_backend
from iwm_fast.models import Segments, VisionTransformer

TYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def levels(images, side, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, side, side, 3), generator=generator, dtype=torch.uint8).to(device)


def affine(patch, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(patch)
    scale, shift = torch.randn(2, 3 * patch * patch, generator=generator)
    return (scale / 64).to(device, dtype), shift.to(device, dtype)


def drawn_index(images, grid, tokens, seed, device):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, grid * grid, (tokens,), generator=generator)
    image = torch.randint(0, images, (tokens,), generator=generator).sort().values
    return {"patches": patches.to(device), "image_of_token": image.to(device)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=20)
@given(
    images=st.integers(1, 3), patch=st.sampled_from([1, 3, 4, 8, 14, 16]), grid=st.integers(1, 3),
    tokens=st.none() | st.integers(0, 40), tables=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_number(dtype, images, patch, grid, tokens, tables, seed, device):
    """Rounded once to the result's dtype; in fp32 one rounding of the product and one of the sum."""
    pixels, (scale, shift) = levels(images, patch * grid, seed, device), affine(patch, device, tables)
    index = {} if tokens is None else drawn_index(images, grid, tokens, seed, device)
    found = patchify(pixels, patch, scale, shift, dtype=dtype, backend="triton", **index)
    there = {name: value.cpu() for name, value in index.items()}
    exact = patchify(pixels.cpu(), patch, scale.double().cpu(), shift.double().cpu(), dtype=torch.float64, **there)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    product = (exact - shift.double().cpu()).abs()
    bound = HALF_STEP[dtype] * exact.abs() + HALF_STEP[torch.float32] * (product + exact.abs()) + 2.0**-25
    assert ((found.double().cpu() - exact).abs() <= 1.01 * bound).all()


def test_strided_images_and_indices_give_the_same(device):
    pixels, (scale, shift) = levels(6, 16, 0, device), affine(8, device)
    index = drawn_index(3, 2, 20, 0, device)
    strided = {name: value.repeat_interleave(2)[::2] for name, value in index.items()}
    for view in (pixels[::2], pixels[:3].transpose(1, 2), pixels[:3].flip(3)):
        options = {"dtype": torch.bfloat16, "backend": "triton"}
        found = patchify(view, 8, scale, shift, **options, **strided)
        assert torch.equal(found, patchify(view.contiguous(), 8, scale, shift, **options, **index))


def test_a_patch_that_no_image_has_is_never_silent(device):
    """On the CPU the public function refuses it; on a device a check would synchronise, so the kernel returns NaN."""
    pixels, (scale, shift) = levels(2, 8, 0, device), affine(4, device)
    patches = torch.tensor([0, 4, -1, 3, 2, 1], device=device)
    image = torch.tensor([0, 0, 1, 2, -1, 1], device=device)
    rows = torch.ops.iwm_fast.patchify(pixels, patches, image, scale, shift, 4, torch.float32)
    assert rows[1:5].isnan().all()
    assert rows[[0, 5]].isfinite().all()


@pytest.mark.parametrize("patch", [4, 14])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_element_is_written_and_equal_inputs_give_equal_bits(dtype, patch, device, monkeypatch):
    pixels, (scale, shift) = levels(2, 3 * patch, 0, device), affine(patch, device)
    given = {"dtype": dtype, "backend": "triton"} | drawn_index(2, 3, 21, 0, device)
    expected = patchify(pixels, patch, scale, shift, **given)
    empty = torch.empty

    def poisoned(*shape, **options):
        fresh = empty(*shape, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(patchify(pixels, patch, scale, shift, **given), expected)


@pytest.mark.parametrize("indexed", [True, False])
def test_opcheck_and_operations(indexed, device):
    pixels, (scale, shift) = levels(2, 8, 0, device), affine(4, device)
    index = drawn_index(2, 2, 5, 0, device) if indexed else {"patches": None, "image_of_token": None}
    inputs = (pixels, *index.values(), scale, shift, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.iwm_fast.patchify.default, inputs)
    with FlopCounterMode(display=False) as counter:
        patchify(pixels, 4, scale, shift, dtype=torch.bfloat16, backend="triton", **index)
    assert counter.get_total_flops() == patchify_flops(5 if indexed else 8, 4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "all patches"])
def test_an_encoder_reads_its_images_by_it(packed, device):
    """The same values up to a rounding, so the same tokens and gradients up to fp32's rounding in two blocks."""
    torch.manual_seed(0)
    encoder = VisionTransformer(EncoderArchitecture(EncoderShape(depth=2, width=16, heads=2), 12, 4), "sdpa").to(device)
    pixels = levels(2, 12, 0, device)
    given = (torch.tensor([8, 0, 5, 1, 2], device=device), Segments.from_lengths((2, 3), device)) if packed else ()
    answers = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            out = encoder(pixels, *given)
            gradient = torch.autograd.grad(out.square().sum(), encoder.patch_embed.proj.weight)[0]
        answers.append((out, gradient))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
