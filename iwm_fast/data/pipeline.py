"""The DALI definition of the two views: decode, crop, resize, flip, rotate, jitter, grayscale, blur, solarize.

One definition serves ``device="cpu"`` and ``device="gpu"`` (mixed decode: nvJPEG, then operators on the GPU); a CPU
runs it in tests only, and elsewhere decodes with DALI and renders with `cpu_views`, to the same reference. Nothing
is drawn here: every parameter arrives from the host through an external source, so what was done to an image is what
the predictor is told. Operators that a sample does not need (blur, solarize, grayscale, a neutral jitter, a rotation)
are kept off it by conditionals (an `if` statement on a batch is DALI's, sample by sample), which also makes a view
without them bit-equal to its base.

The order is DESIGN's. Flips and half of a rotation cost nothing: the resize reads its region of interest backwards
(``roi_start > roi_end``), which leaves only a transpose to quarter turns. EXIF's orientation is one more of these.
"""

# ruff: noqa: SIM108  (DALI translates if statements, not conditional expressions)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from iwm_fast.actions import Jitter, Views
from iwm_fast.data.cpu_operators import recolour_matrices
from iwm_fast.data.encoded import Encoded
from iwm_fast.data.orientation import Placement, place

__all__ = ["DECODED", "build_decoder", "build_views", "view_inputs"]

# What a decoder is fed, by name.
DECODED = ("encoded", "start", "shape")

# Antialiased linear: half the time of antialiased cubic on the CPU (5.9 against 10.3 ns a pixel read), the same look.
INTERPOLATION = types.INTERP_TRIANGULAR
_JITTER = ("brightness", "contrast", "saturation", "hue")
# Conditionals and outputs that outlive the next batch both need the dynamic executor; one batch a schedule_run.
_EXECUTION = {"exec_dynamic": True, "enable_conditionals": True, "prefetch_queue_depth": 1, "set_affinity": False}


def _host(name: str, dtype: types.DALIDataType, ndim: int) -> Any:
    """A batch of small arrays that the host feeds by name."""
    return fn.external_source(name=name, batch=True, dtype=dtype, ndim=ndim)


def _scalars(name: str, dtype: types.DALIDataType = types.FLOAT) -> Any:
    return _host(name, dtype, 0)


def _decode(device: str, hw_decoder_load: float) -> Any:
    """Encoded bytes -> (h, w, 3) uint8: only the region that the crops need, in coordinates of the stored image."""
    return fn.decoders.image_slice(
        _host("encoded", types.UINT8, 1),
        start=_host("start", types.INT32, 1),
        shape=_host("shape", types.INT32, 1),
        axis_names="WH",
        adjust_orientation=False,  # done where the view is placed; a second reading of EXIF could only disagree
        device="mixed" if device == "gpu" else "cpu",
        jpeg_fancy_upsampling=True,  # nvJPEG then upsamples chroma as libjpeg-turbo (and Pillow) do
        hw_decoder_load=hw_decoder_load,  # read on a GPU only
    )


def _resize(image: Any, view: str, size: int) -> Any:
    """Resized, mirrored (the region of interest is read backwards) and, where the sample needs it, transposed."""
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
    brightness, contrast, saturation, hue = (_scalars(f"{view}_{name}") for name in _JITTER)
    if jittered:
        out = fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    else:
        out = image
    return out


def _gray(image: Any) -> Any:
    """Luma (.299, .587, .114) in all three channels."""
    luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(luma, image_type=types.GRAY, output_type=types.RGB)


def _solarized(image: Any, threshold: Any) -> Any:
    """255 - v where v ≥ threshold: for uint8, v with all its bits turned."""
    return image ^ ((image >= threshold) * types.Constant(255, dtype=types.UINT8))


def _destroy(image: Any, source: str, device: str) -> Any:
    """Grayscale, blur and solarize, each only where the sample has it."""
    grayscale = _scalars(f"{source}_grayscale", types.BOOL)
    blurred = _scalars(f"{source}_blurred", types.BOOL)
    solarized = _scalars(f"{source}_solarized", types.BOOL)
    sigma = _scalars(f"{source}_blur_sigma")
    threshold = _scalars(f"{source}_solarize_threshold", types.UINT8)
    if device == "gpu":
        threshold = threshold.gpu()
    if grayscale:
        toned = _gray(image)
    else:
        toned = image
    if blurred:
        soft = fn.gaussian_blur(toned, sigma=sigma)
    else:
        soft = toned
    if solarized:
        out = _solarized(soft, threshold)
    else:
        out = soft
    return out


@pipeline_def(**_EXECUTION)
def _views(
    size: int,
    device: str,
    geometric: bool,
    sources: tuple[str, ...],
    hw_decoder_load: float,
) -> tuple[Any, ...]:
    decoded = _decode(device, hw_decoder_load)
    if geometric:
        base = _geometry(decoded, "target", size)
        own = {source: _geometry(decoded, source, size) for source in sources}
    else:
        base = _resize(decoded, "target", size)
        own = dict.fromkeys(sources, base)
    target = _jitter(base, "target")
    made = [_destroy(_jitter(own[source], source), source, device) for source in sources]
    if geometric:
        return (target, base, *made, *own.values())
    return (target, base, *made)


@pipeline_def(**_EXECUTION)
def _decoder(device: str) -> Any:
    return _decode(device, 0.0)


def build_views(
    size: int,
    batch: int,
    device: str,
    threads: int,
    *,
    geometric: bool,
    sources: int,
    hw_decoder_load: float,
    device_id: int | None,
) -> Any:
    """A built pipeline of (target, base, K sources[, K bases of them]), each (B, size, size, 3) uint8, B ≤ ``batch``.

    sources: K.
    """
    pipeline = _views(
        size,
        device,
        geometric,
        _names(sources),
        hw_decoder_load,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id if device == "gpu" else None,
    )
    pipeline.build()
    return pipeline


def build_decoder(device: str, *, device_id: int | None, batch: int = 1, threads: int = 1) -> Any:
    """A built pipeline that only decodes, the region of each image that its views need; it is fed `DECODED`."""
    pipeline = _decoder(device, batch_size=batch, num_threads=threads, device_id=device_id if device == "gpu" else None)
    pipeline.build()
    return pipeline


def _names(sources: int) -> tuple[str, ...]:
    return tuple(f"source{k}" for k in range(sources))


def _union(boxes: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    """The smallest boxes that hold the given ones, each (B, 4) x, y, width, height."""
    start = np.minimum.reduce([box[:, :2] for box in boxes])
    end = np.maximum.reduce([box[:, :2] + box[:, 2:] for box in boxes])
    return np.concatenate([start, end - start], axis=1).astype(np.int32)


def _placement_inputs(placement: Placement, view: str) -> dict[str, Any]:
    """Relative start and end in the order height, width, exchanged where the view is mirrored; and the transpose."""
    start = np.stack([placement.down, placement.across], axis=1).astype(np.float32)
    return {f"{view}_roi_start": start, f"{view}_roi_end": 1 - start, f"{view}_transposed": placement.transposed}


def _jitter_inputs(jitter: Jitter, view: str, *, dali_only: bool) -> dict[str, Any]:
    jittered = (jitter.brightness != 1) | (jitter.contrast != 1) | (jitter.saturation != 1) | (jitter.hue != 0)
    inputs: dict[str, Any] = {f"{view}_jittered": jittered}
    if not dali_only:
        return inputs | {f"{view}_matrix": recolour_matrices(jitter)}
    return inputs | {f"{view}_{name}": getattr(jitter, name).astype(np.float32) for name in _JITTER}


def _source_inputs(views: Views, source: str, *, dali_only: bool) -> dict[str, Any]:
    return _jitter_inputs(views.source, source, dali_only=dali_only) | {
        f"{source}_grayscale": views.grayscale.astype(bool),
        f"{source}_blurred": views.blur_sigma > 0,
        f"{source}_blur_sigma": views.blur_sigma.astype(np.float32),
        f"{source}_solarized": views.solarize_threshold < 256,
        f"{source}_solarize_threshold": np.minimum(views.solarize_threshold, 255).astype(np.uint8),
    }


def _box_inputs(box: NDArray[np.int64], view: str, region: NDArray[np.int32]) -> dict[str, Any]:
    return {f"{view}_start": box[:, :2].astype(np.int32) - region[:, :2], f"{view}_shape": box[:, 2:].astype(np.int32)}


def view_inputs(
    encoded: Sequence[Encoded], views: Views, *, geometric: bool, sources: int, dali_only: bool
) -> dict[str, Any]:
    """What the host feeds for B samples, by name: bytes, boxes, and every parameter of the views.

    views: B · K rows, a sample's K sources side by side; dali_only: for `build_views`, not for `cpu_views`.
    """
    rows = np.arange(0, len(views), sources)
    parts = {name: views.take(rows + k) for k, name in enumerate(_names(sources))}
    target = next(iter(parts.values()))
    orientation = [one.orientation for one in encoded]
    placed = {"target": place(target.target_geometry, target.size, orientation)}
    if geometric:
        placed |= {name: place(part.source_geometry, part.size, orientation) for name, part in parts.items()}
    region = _union([placement.box for placement in placed.values()])
    inputs: dict[str, Any] = {"encoded": [one.data for one in encoded], "start": region[:, :2], "shape": region[:, 2:]}
    inputs |= _jitter_inputs(target.target, "target", dali_only=dali_only)
    for name, placement in placed.items():
        inputs |= _placement_inputs(placement, name)
        if geometric:
            inputs |= _box_inputs(placement.box, name, region)
    for name, part in parts.items():
        inputs |= _source_inputs(part, name, dali_only=dali_only)
    # DALI takes dense arrays only
    return {name: np.ascontiguousarray(value) if name != "encoded" else value for name, value in inputs.items()}
