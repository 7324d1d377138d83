"""patchify on the CPU against a float64 evaluation level by level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwm_fast.kernels import patchify, patchify_bytes, patchify_flops


def levels(images: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, side, side, 3), generator=generator, dtype=torch.uint8)


def affine(patch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(patch)
    scale, shift = torch.randn(2, 3 * patch * patch, generator=generator, dtype=torch.float64).to(dtype)
    return scale / 64, shift


def one(image: Tensor, patch: int, number: int, scale: Tensor, shift: Tensor) -> list[float]:
    """Return the row of one patch, level by level."""
    across = image.shape[1] // patch
    top, left = number // across * patch, number % across * patch
    row = [int(image[top + y, left + x, c]) for y in range(patch) for x in range(patch) for c in range(3)]
    return [v * float(a) + float(b) for v, a, b in zip(row, scale, shift, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(0, 3), patch=st.integers(1, 4), grid=st.integers(1, 3), tokens=st.integers(0, 5),
    indexed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_number(images: int, patch: int, grid: int, tokens: int, indexed: bool, seed: int) -> None:
    pixels, (scale, shift) = levels(images, patch * grid, seed), affine(patch)
    generator = torch.Generator().manual_seed(seed)
    index = {}
    wanted = [(b, p) for b in range(images) for p in range(grid * grid)]
    if indexed:
        chosen = torch.randint(0, max(images, 1), (tokens if images else 0,), generator=generator)
        patches = torch.randint(0, grid * grid, chosen.shape, generator=generator)
        index = {"patches": patches, "image_of_token": chosen}
        wanted = list(zip(chosen.tolist(), patches.tolist(), strict=True))
    found = patchify(pixels, patch, scale, shift, dtype=torch.float64, **index)
    expected = [one(pixels[b], patch, p, scale, shift) for b, p in wanted]
    assert found.shape == (len(wanted), 3 * patch * patch)
    wanted_rows = torch.tensor(expected, dtype=torch.float64).view(found.shape)
    torch.testing.assert_close(found, wanted_rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """Levels and tables are exact in fp32: the only errors are half a step of the result and fp32's own rounding."""
    pixels, (scale, shift) = levels(2, 12), affine(4, torch.float32)
    found = patchify(pixels, 4, scale, shift, dtype=dtype)
    exact = patchify(pixels, 4, scale.double(), shift.double(), dtype=torch.float64)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def test_strided_images_are_read_where_they_lie() -> None:
    pixels, (scale, shift) = levels(6, 8), affine(4)
    for view in (pixels[::2], pixels.transpose(1, 2), pixels.flip(3)):
        found = patchify(view, 4, scale, shift, dtype=torch.float64)
        assert torch.equal(found, patchify(view.contiguous(), 4, scale, shift, dtype=torch.float64))


def index(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GIVEN = {"images": levels(2, 8), "patch": 4, "scale": affine(4)[0], "shift": affine(4)[1], "dtype": torch.float64}
REFUSED = {
    "images": ({"images": torch.zeros(2, 8, 8, 3)}, "images are torch.float32"),
    "images not square": ({"images": levels(2, 8)[:, :4]}, r"images are torch.uint8 \(2, 4, 8, 3\)"),
    "patch": ({"patch": 3}, "patch is 3; it must divide the side of the images, 8"),
    "scale": ({"scale": torch.zeros(3)}, "scale has shape"),
    "shift": ({"shift": torch.zeros(48, dtype=torch.int64)}, "shift is torch.int64"),
    "dtype": ({"dtype": torch.uint8}, "dtype is torch.uint8"),
    "patches alone": ({"patches": index(0)}, "give both or neither"),
    "index shape": ({"patches": index(0, 1), "image_of_token": index(0)}, "image_of_token has shape"),
    "index type": (
        {"patches": index(0, dtype=torch.int32), "image_of_token": index(0)},
        "patches is torch.int32; it must be torch.int64",
    ),
    "no such patch": ({"patches": index(0, 4), "image_of_token": index(0, 0)}, "patches spans 0 to 4"),
    "no image at all": (
        {"images": torch.zeros(0, 4, 4, 3, dtype=torch.uint8), "patches": index(0), "image_of_token": index(0)},
        "image_of_token is not empty; images has no rows",
    ),
    "no such image": ({"patches": index(0, 3), "image_of_token": index(-1, 1)}, "image_of_token spans -1 to 1"),
    "triton in float64": ({"backend": "triton"}, "dtype is torch.float64; backend .triton. needs"),
    "triton on the CPU": ({"backend": "triton", "dtype": torch.float32}, "images is on cpu; backend .triton. needs"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify(**(GIVEN | change))


@pytest.mark.parametrize("side", [0, 4])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "all"])
def test_no_patches(side: int, indexed: bool) -> None:
    images, table, nothing = torch.zeros(0 if side else 2, side, side, 3, dtype=torch.uint8), torch.ones(12), index()
    given = {"patches": nothing, "image_of_token": nothing} if indexed else {}
    assert patchify(images, 2, table, table, dtype=torch.float32, **given).shape == (0, 12)


def test_counts_by_hand() -> None:
    assert patchify_bytes(10, 4) == 10 * (48 * 3 + 16)
    assert patchify_bytes(10, 4, element=4, indexed=False) == 10 * 48 * 5
    assert patchify_flops(10, 4) == 960
