"""Every transformation of the views, image by image, in NumPy and float64: the reference of the DALI graph.

Images are (h, w, 3) uint8 arrays. Formulas are written from the papers and torchvision's, not taken from the code under
test. Each operator rounds and clips its result to levels once, as the graph does between operators.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

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


def compress(image, quality):
    """Compress to a JPEG of that quality by libjpeg-turbo, with chroma at half resolution, and decode."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(file).convert("RGB"))


# ISO/IEC 10918-1, tables K.1 and K.2.
LUMA_STEPS = """
16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMA_STEPS = np.full((8, 8), 99)
CHROMA_STEPS[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]


def _quantized(plane, steps, quality):
    """Return a plane (h, w), both multiples of 8, after quantization of its blocks' DCT."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = np.clip((steps * percent + 50) // 100, 1, 255)
    k, n = np.mgrid[:8, :8]
    dct = np.sqrt(np.where(k == 0, 1, 2) / 8) * np.cos((2 * n + 1) * k * np.pi / 16)
    height, width = plane.shape
    blocks = (plane - 128).reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3)
    blocks = dct.T @ (steps * np.round(dct @ blocks @ dct.T / steps)) @ dct
    return levels(blocks.transpose(0, 2, 1, 3).reshape(height, width) + 128).astype(float)


def compress_without_interpolation(image, quality):
    """`compress` as DALI does it on a GPU: chroma is the mean of four pixels, and the same for all four."""
    height, width = image.shape[:2]
    quality = int(quality)
    padding = [(0, -height % 16), (0, -width % 16), (0, 0)]
    pixels = np.pad(image, padding, mode="edge").astype(float)
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
    mean = levels(pixels.reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3)))
    luma = levels(pixels @ [0.299, 0.587, 0.114]).astype(float)
    blue = levels(mean @ [-0.16873589, -0.33126411, 0.5] + 128).astype(float)
    red = levels(mean @ [0.5, -0.41868759, -0.08131241] + 128).astype(float)
    luma = _quantized(luma, np.array(LUMA_STEPS.split(), int).reshape(8, 8), quality)
    blue, red = (_quantized(plane, CHROMA_STEPS, quality).repeat(2, 0).repeat(2, 1) - 128 for plane in (blue, red))
    colours = [luma + 1.402 * red, luma - 0.34413629 * blue - 0.71413629 * red, luma + 1.772 * blue]
    return levels(np.stack(colours, axis=2))[:height, :width]


def _weights(length, size):
    """Return (size, length): the antialiased linear filter, a triangle as wide as an output pixel, or an input pixel
    if that is wider."""
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
    if views.compression_quality[row] <= 100:
        out = compress(out, views.compression_quality[row])
    return out


def error(one, other):
    """Mean absolute difference in levels."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())
