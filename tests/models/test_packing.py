"""Segments, their order by length, and concatenation of packed sets."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.kernels.permutation import invert, take_rows
from iwm_fast.models.packing import Segments, held_segments, interleave, pack

LENGTHS = st.lists(st.integers(0, 6), max_size=8)


@given(lengths=LENGTHS)
@settings(deadline=None, max_examples=40)
def test_segments_describe_the_tokens(lengths: list[int]) -> None:
    segments = Segments.from_lengths(lengths)
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens.tolist() == [0, *np.cumsum(lengths).astype(int).tolist()]
    assert segments.total == sum(lengths)
    assert segments.image_of_token.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert [n for images, n in segments.groups for _ in range(images)] == lengths
    assert segments.is_sorted == (lengths == sorted(lengths))


@given(lengths=LENGTHS)
@settings(deadline=None, max_examples=40)
def test_order_by_length_there_and_back(lengths: list[int]) -> None:
    segments = Segments.from_lengths(lengths)
    ordered = segments.by_length
    assert list(ordered.segments.lengths) == sorted(lengths)
    assert ordered.segments.is_sorted
    tokens = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
    images = ordered.image_order.tolist()
    assert [tokens[k] for k in ordered.token_order.tolist()] == [(i, t) for i in images for t in range(lengths[i])]
    assert torch.equal(ordered.token_order[ordered.token_rank], torch.arange(segments.total))


@given(data=st.data(), images=st.integers(0, 6), parts=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_interleave_puts_the_parts_of_an_image_side_by_side(data: st.DataObject, images: int, parts: int) -> None:
    row = st.lists(st.integers(0, 4), min_size=images, max_size=images)
    lengths = [data.draw(row) for _ in range(parts)]
    joined, places = interleave([Segments.from_lengths(part) for part in lengths])
    expected = [(i, p, t) for i in range(images) for p in range(parts) for t in range(lengths[p][i])]
    assert list(joined.lengths) == [sum(part[i] for part in lengths) for i in range(images)]
    for p, place in enumerate(places):
        tokens = [(i, p, t) for i in range(images) for t in range(lengths[p][i])]
        assert [expected[k] for k in place.tolist()] == tokens


def test_padding_follows_the_images_and_reads_the_last_one() -> None:
    patches, segments = pack(np.array([5, 7, 2]), np.array([2, 1]), "cpu", [3, 2], 4)
    assert patches.tolist() == [5, 7, 2, 0, 1, 2, 0, 1]
    assert segments.lengths == (2, 1, 3, 2)
    assert (segments.total, segments.real, segments.images) == (8, 3, 2)
    assert segments.image_of_token.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert segments.pixels_of_token.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_concatenated_padding_stays_padding_and_ceilings_add_up() -> None:
    parts = [Segments.from_lengths(lengths, "cpu", 1, ceiling) for lengths, ceiling in (([2, 1, 3], 5), ([1, 1, 2], 4))]
    joined, _ = interleave([*parts, Segments.uniform(3, 2)])
    assert (joined.lengths, joined.padding, joined.ceiling) == ((5, 4, 7), 1, 11)
    assert interleave([parts[0], Segments.from_lengths([1, 1, 1])])[0].ceiling is None


@pytest.mark.slow  # the import of xformers
def test_a_mask_with_a_ceiling_divides_as_one_without() -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias")
    with_ceiling = Segments.from_lengths([3, 1, 4], "cpu", 1, 6).block_diagonal_mask
    without = Segments.from_lengths([3, 1, 4]).block_diagonal_mask
    assert torch.equal(with_ceiling.materialize((8, 8)), without.materialize((8, 8)))
    assert with_ceiling.q_seqinfo.max_seqlen == 6


def test_take_rows_differentiates_as_indexing() -> None:
    order = torch.tensor([3, 0, 2, 1])
    x, weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((take_rows(x, order, invert(order)) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((x[order] * weight).sum(), x)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lengths", [[1, -1], [[1, 2]]], ids=["negative", "two rows"])
def test_wrong_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be"):
        Segments.from_lengths(lengths)


def test_segments_of_equal_lengths_are_kept_for_recent_sizes_and_as_long_as_something_holds_them() -> None:
    """Rollouts ask for any number of images: of each a set kept forever would fill the device."""
    held: set[Segments] = set()
    with held_segments(held):
        mine = Segments.uniform(3, 5)
    others = [weakref.ref(Segments.uniform(images, 7)) for images in range(300)]
    gc.collect()
    assert sum(other() is not None for other in others) <= 64
    assert Segments.uniform(299, 7) is others[-1]()
    assert Segments.uniform(3, 5) is mine
    assert held == {mine}


def test_what_an_evaluation_derives_first_a_training_can_use() -> None:
    with torch.inference_mode():
        segments = Segments.from_lengths([2, 0, 1, 3, 2], padding=1)
        derived = [segments.image_of_token, segments.filled_bounds, segments.pixels_of_token]
        derived += [segments.by_length.token_order, segments.by_length.token_rank, segments.by_length.image_order]
        derived += [segments.by_length.segments.image_of_token]
    assert not any(tensor.is_inference() for tensor in derived)
