from __future__ import annotations

import numpy as np
import pytest
import reference_views as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_images import picture

from iwm_fast.actions import Jitter
from iwm_fast.data.cpu_operators import CpuOperators, recolour, recolour_matrices, resize

factors = st.floats(0, 3, width=32)
START, END = np.zeros(2, np.float32), np.ones(2, np.float32)


def one_jitter(*values):
    return Jitter(*(np.array([value], np.float32) for value in values))


@given(factors, factors, factors, st.floats(-180, 180, width=32), st.integers(1, 9), st.integers(1, 9))
def test_recolour_is_the_affine_map_rounded_once(b, c, s, hue, height, width):
    """Any number of pixels, also one that eight does not divide; a float32 sum may fall on the other side of a half."""
    image = picture(width, height, 3)
    ours = recolour(image, recolour_matrices(one_jitter(b, c, s, hue))[0])
    difference = np.abs(reference.jitter(image, b, c, s, hue).astype(int) - ours)
    assert ours.shape == image.shape
    assert difference.max() <= 1
    assert difference.mean() <= 0.05


def test_recolour_clips_at_both_ends():
    image = np.array([[[0, 128, 255]]], np.uint8)
    assert recolour(image, recolour_matrices(one_jitter(3, 1, 1, 0))[0]).tolist() == [[[0, 255, 255]]]
    assert recolour(image, recolour_matrices(one_jitter(1, 2, 1, 0))[0]).tolist() == [[[0, 128, 255]]]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_resize_is_the_antialiased_linear_filter(height, width, size):
    """Its two roundings and its weights in 16 bits leave under a level."""
    image = picture(width, height, 5)
    assert reference.error(reference.resize(image, size), resize(image, START, END, size)) <= 0.6


@pytest.mark.parametrize(("down", "across"), [(False, True), (True, False), (True, True)])
def test_resize_mirrors_where_start_and_end_are_exchanged(down, across):
    image = picture(33, 47)
    mirrored = np.array([down, across], np.float32)
    expected = np.flip(resize(image, START, END, 20), [axis for axis in range(2) if mirrored[axis]])
    assert np.array_equal(resize(image, mirrored, 1 - mirrored, 20), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_on_any_number_of_threads(threads):
    images = [picture(30 + n, 40 - n, n) for n in range(9)]
    operators = CpuOperators(16, threads)
    resized = operators.resize(images, [START] * 9, [END] * 9)
    assert all(np.array_equal(one, resize(image, START, END, 16)) for one, image in zip(resized, images, strict=True))
    assert operators.recolour([], []) == []
    operators.close()


def test_the_answer_does_not_depend_on_torchs_threads():
    image = picture(300, 200)
    matrix = recolour_matrices(one_jitter(1.3, 0.8, 1.2, 20))[0]
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append((recolour(image, matrix).tobytes(), resize(image, START, END, 64).tobytes()))
    torch.set_num_threads(before)
    assert answers[0] == answers[1]
