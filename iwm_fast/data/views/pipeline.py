"""The DALI definition of the two views: decode, crop, resize, flip, rotate, jitter, corruptions.

One definition serves ``device="cpu"`` and ``device="gpu"`` (mixed decode: nvJPEG, then operators on the GPU); a CPU
runs it in tests only, and elsewhere decodes with DALI and renders with `cpu_views`, to the same reference. Nothing is
sampled here: every parameter arrives from the host through an external source, so the applied parameters are those that
condition the predictor. Conditionals skip operators that a sample does not need (a corruption, a neutral jitter, a
rotation), because an `if` statement on a batch is DALI's, sample by sample; so a view without them is bit-equal to its
base.

Flips and half of a rotation take no time: the resize reads its region of interest backwards (``roi_start > roi_end``),
which leaves only a transpose for quarter turns. EXIF's orientation is one more of these.
"""

# ruff: noqa: SIM108  (DALI translates if statements, not conditional expressions)
from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from iwm_fast.actions.transforms import CORRUPTIONS, JITTER, Corruption
from iwm_fast.data.views.gpu_decoder import DecoderPath, decode_path
from iwm_fast.data.views.view_inputs import source_names

__all__ = ["build_decoder", "build_views"]

# Antialiased linear: half the time of antialiased cubic on the CPU (5.9 against 10.3 ns per pixel read), visually the
# same.
INTERPOLATION = types.INTERP_TRIANGULAR
# Conditionals and outputs that outlive the next batch both need the dynamic executor; one batch a schedule_run.
_EXECUTION = {"exec_dynamic": True, "enable_conditionals": True, "prefetch_queue_depth": 1, "set_affinity": False}


def _host(name: str, dtype: types.DALIDataType, ndim: int) -> Any:
    """A batch of small arrays that the host feeds by name."""
    return fn.external_source(name=name, batch=True, dtype=dtype, ndim=ndim)


def _scalars(name: str, dtype: types.DALIDataType = types.FLOAT) -> Any:
    return _host(name, dtype, 0)


def _decode(device: str, hw_decoder_load: float, path: DecoderPath) -> Any:
    """Decode encoded bytes to (h, w, 3) uint8: only the region of the crops, in coordinates of the stored image."""
    return decode_path(
        _host("encoded", types.UINT8, 1),
        _host("start", types.INT32, 1),
        _host("shape", types.INT32, 1),
        path,
        adjust_orientation=False,  # done where the view is placed; a second reading of EXIF could only disagree
        device="mixed" if device == "gpu" else "cpu",
        jpeg_fancy_upsampling=True,  # nvJPEG then upsamples chroma as libjpeg-turbo (and Pillow) do
        hw_decoder_load=hw_decoder_load,  # read on a GPU only
    )


def _resize(image: Any, view: str, size: int) -> Any:
    """Resize, mirror (the region of interest is read backwards) and, where the sample needs it, transpose."""
    start, end = (_host(f"{view}_roi_{side}", types.FLOAT, 1) for side in ("start", "end"))
    transposed = _scalars(f"{view}_transposed", types.BOOL)
    resized = fn.resize(
        image,
        size=[size, size],
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        interp_type=INTERPOLATION,
        antialias=True,
    )
    if transposed:
        out = fn.transpose(resized, perm=[1, 0, 2], transpose_layout=False)
    else:
        out = resized
    return out


def _geometry(image: Any, view: str, size: int) -> Any:
    """The view's own box of the decoded region, resized, flipped and rotated."""
    box = fn.slice(
        image,
        start=_host(f"{view}_start", types.INT32, 1),
        shape=_host(f"{view}_shape", types.INT32, 1),
        axis_names="WH",
    )
    return _resize(box, view, size)


def _jitter(image: Any, view: str) -> Any:
    jittered = _scalars(f"{view}_jittered", types.BOOL)
    brightness, contrast, saturation, hue = (_scalars(f"{view}_{name}") for name in JITTER)
    if jittered:
        out = fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    else:
        out = image
    return out


def _gray(image: Any, _: None) -> Any:
    """Luma (.299, .587, .114) in all three channels."""
    luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(luma, image_type=types.GRAY, output_type=types.RGB)


def _blurred(image: Any, sigma: Any) -> Any:
    return fn.gaussian_blur(image, sigma=sigma)


def _solarized(image: Any, threshold: Any) -> Any:
    """255 - v where v ≥ threshold: for uint8, v with all its bits turned."""
    if image.device == "gpu":
        threshold = threshold.gpu()
    return image ^ ((image >= threshold) * types.Constant(255, dtype=types.UINT8))


def _compressed(image: Any, quality: Any) -> Any:
    """To JPEG and back, chroma of half the resolution; on a GPU chroma comes back without interpolation."""
    return fn.jpeg_compression_distortion(image, quality=quality)


# By the name of the corruption; each takes the image and how strong it is.
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "grayscale": _gray,
    "blur": _blurred,
    "solarize": _solarized,
    "compression": _compressed,
}
_TYPES = {"float32": types.FLOAT, "uint8": types.UINT8, "int32": types.INT32}


def _corrupt(image: Any, source: str, corruption: Corruption) -> Any:
    """Apply the corruption where the sample has it."""
    done = _scalars(f"{source}_{corruption.name}", types.BOOL)
    strength = None
    if corruption.strength is not None:
        strength = _scalars(f"{source}_{corruption.strength}", _TYPES[np.dtype(corruption.fed).name])
    operator = _OPERATORS[corruption.name]
    if done:
        out = operator(image, strength)
    else:
        out = image
    return out


def _source(image: Any, source: str, corruptions: Collection[str]) -> Any:
    """Jitter, then each corruption in its order."""
    out = _jitter(image, source)
    for corruption in CORRUPTIONS:
        if corruption.name in corruptions:
            out = _corrupt(out, source, corruption)
    return out


@pipeline_def(**_EXECUTION)
def _views(
    size: int,
    device: str,
    geometric: bool,
    sources: tuple[str, ...],
    corruptions: Collection[str],
    hw_decoder_load: float,
    path: DecoderPath,
) -> tuple[Any, ...]:
    decoded = _decode(device, hw_decoder_load, path)
    if geometric:
        base = _geometry(decoded, "target", size)
        own = {source: _geometry(decoded, source, size) for source in sources}
    else:
        base = _resize(decoded, "target", size)
        own = dict.fromkeys(sources, base)
    target = _jitter(base, "target")
    made = [_source(own[source], source, corruptions) for source in sources]
    if geometric:
        return (target, base, *made, *own.values())
    return (target, base, *made)


@pipeline_def(**_EXECUTION)
def _decoder(device: str, path: DecoderPath) -> Any:
    return _decode(device, 0.0, path)


def build_views(
    size: int,
    batch: int,
    device: str,
    threads: int,
    *,
    geometric: bool,
    sources: int,
    corruptions: Collection[str],
    hw_decoder_load: float,
    device_id: int | None,
    path: DecoderPath = "image_slice",
) -> Any:
    """A built pipeline of (target, base, K sources[, K bases of them]), each (B, size, size, 3) uint8, B ≤ ``batch``.

    sources: K. corruptions: names of those that a sample may have. path: of DALI's decoders, as `gpu_decoder` found it.
    """
    pipeline = _views(
        size,
        device,
        geometric,
        source_names(sources),
        corruptions,
        hw_decoder_load,
        path,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id if device == "gpu" else None,
    )
    pipeline.build()
    return pipeline


def build_decoder(
    device: str, *, device_id: int | None, batch: int = 1, threads: int = 1, path: DecoderPath = "image_slice"
) -> Any:
    """A built pipeline that only decodes, the region of each image that its views need; it is fed `DECODED`."""
    gpu = device_id if device == "gpu" else None
    pipeline = _decoder(device, path, batch_size=batch, num_threads=threads, device_id=gpu)
    pipeline.build()
    return pipeline
