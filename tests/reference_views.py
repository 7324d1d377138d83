"""Every transformation of the views again, one image at a time, in NumPy and float64: what the DALI graph has to equal.

Images are (h, w, 3) uint8 arrays. Formulas are written from the papers and torchvision's, not taken from the code under
test. Each operator rounds and clips its result to levels once, as the graph does between operators.
"""

from __future__ import annotations

import numpy as np

from iwm_fast.actions.transforms import Geometry, Jitter, Views

YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def levels(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def jitter(image, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """out = Q⁻¹ · R(h) · diag(1, s, s) · Q · (b·c) · in + 128 · (1 - c) · b"""
    angle = np.deg2rad(float(hue))
    turn = np.array([[1, 0, 0], [0, np.cos(angle), np.sin(angle)], [0, -np.sin(angle), np.cos(angle)]])
    matrix = np.linalg.inv(YIQ) @ turn @ np.diag([1, saturation, saturation]) @ YIQ
    return levels(image @ (matrix * brightness * contrast).T + 128 * (1 - contrast) * brightness)


def grayscale(image):
    return levels(np.repeat((image @ YIQ[0])[..., None], 3, axis=2))


def blur(image, sigma):
    """Separable Gaussian of 2·⌈3σ⌉ + 1 taps, edges mirrored without repeating the outermost pixel."""
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    out = image.astype(float)
    for axis in (0, 1):
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(out, padding, mode="reflect")
        length = out.shape[axis]
        out = sum(tap * np.take(padded, range(k, k + length), axis=axis) for k, tap in enumerate(taps))
    return levels(out)


def solarize(image, threshold):
    return np.where(image >= threshold, 255 - image, image).astype(np.uint8)


def _weights(length, size):
    """(size, length): the antialiased linear filter, a triangle as wide as an output pixel, or an input pixel if
    wider."""
    scale = length / size
    support = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(length) + 0.5 - centre[:, None]) / support, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def resize(image, size):
    down = np.tensordot(_weights(image.shape[0], size), image.astype(float), axes=1)  # (size, w, c)
    across = np.tensordot(_weights(image.shape[1], size), down, axes=(1, 1))  # (size across, size down, c)
    return levels(across.transpose(1, 0, 2))


def place(image, geometry: Geometry, row: int, size: int):
    """Crop, resize, flip and rotate the upright image."""
    x, y, width, height = geometry.crop[row]
    out = resize(image[y : y + height, x : x + width], size)
    if geometry.flip[row]:
        out = out[:, ::-1]
    return np.rot90(out, geometry.rotation[row])


def jittered(image, values: Jitter, row: int):
    return jitter(image, values.brightness[row], values.contrast[row], values.saturation[row], values.hue[row])


def target(base, views: Views, row: int):
    return jittered(base, views.target, row)


def source(base, views: Views, row: int):
    out = jittered(base, views.source, row)
    if views.grayscale[row]:
        out = grayscale(out)
    if views.blur_sigma[row]:
        out = blur(out, float(views.blur_sigma[row]))
    if views.solarize_threshold[row] < 256:
        out = solarize(out, views.solarize_threshold[row])
    return out


def error(one, other):
    """Mean absolute difference in levels."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())
