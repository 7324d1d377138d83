from __future__ import annotations

import numpy as np
import pytest
import reference_views as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_images import picture

from iwm_fast.actions.transforms import Jitter
from iwm_fast.data.views.cpu_operators import blur, grayscale, recolour, recolour_matrices, resize, solarize

factors = st.floats(0, 3, width=32)


def resized(image, size, **turns):
    return resize(torch.from_numpy(image), size, **turns).numpy()


def one_jitter(*values):
    return Jitter(*(np.array([value], np.float32) for value in values))


@given(factors, factors, factors, st.floats(-180, 180, width=32), st.integers(1, 9), st.integers(1, 9))
def test_recolour_is_the_affine_map_rounded_once(b, c, s, hue, height, width):
    """Any number of pixels, also not a multiple of eight; a float32 sum may round a half the other way."""
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
    """Its two roundings and its 16-bit weights are off by at most a level, and far less in the mean."""
    image = picture(width, height, 5)
    expected, found = reference.resize(image, size), resized(image, size)
    assert np.abs(expected.astype(int) - found).max() <= 1
    if found.size >= 27:  # three values of one pixel may all round the other way
        assert reference.error(expected, found) <= 0.6


@pytest.mark.parametrize(("down", "across"), [(False, True), (True, False), (True, True)])
def test_resize_mirrors_down_and_across(down, across):
    image = picture(33, 47)
    expected = np.flip(resized(image, 20), [axis for axis in range(2) if (down, across)[axis]])
    assert np.array_equal(resized(image, 20, down=down, across=across), expected)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 20))
def test_blur_is_the_mirrored_gaussian(height, width, sigma):
    """At any size, even if the taps reach over both edges; a float32 sum may round a half the other way."""
    image = picture(width, height, 4)
    difference = np.abs(reference.blur(image, sigma).astype(int) - blur(image, sigma))
    assert difference.max() <= 1
    assert difference.mean() <= 0.02


def test_a_blur_of_white_and_of_black_stays_so():
    for level in (0, 255):
        flat = np.full((37, 41, 3), level, np.uint8)
        assert np.array_equal(blur(flat, 1.7), flat)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255))
def test_grayscale_and_solarize_are_the_references(height, width, threshold):
    image = picture(width, height, 6)
    assert np.abs(reference.grayscale(image).astype(int) - grayscale(image)).max() <= 1
    turned = image.copy()
    solarize(turned, threshold)
    assert np.array_equal(turned, reference.solarize(image, threshold))


def test_every_operator_may_write_over_its_image():
    image, matrix = picture(45, 31), recolour_matrices(one_jitter(1.3, 0.8, 1.2, 20))[0]
    for operator in (lambda *a: recolour(a[0], matrix, *a[1:]), grayscale, lambda *a: blur(a[0], 1.3, *a[1:])):
        own = image.copy()
        assert np.array_equal(operator(own, own), operator(image))


def test_the_answer_does_not_depend_on_torchs_threads():
    image = picture(300, 200)
    matrix = recolour_matrices(one_jitter(1.3, 0.8, 1.2, 20))[0]
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append((recolour(image, matrix).tobytes(), resized(image, 64).tobytes(), blur(image, 1.1).tobytes()))
    torch.set_num_threads(before)
    assert answers[0] == answers[1]
