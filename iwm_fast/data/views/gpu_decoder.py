"""Find out which of DALI's decoders works on this GPU, in a process that may crash.

``decoders.image_slice`` (decode the crop's region only) is the fast path. With some releases of nvImageCodec it ends
the process by a segmentation fault on some GPUs, which no ``except`` survives; the slower path decodes the whole image
and slices it. So the first launch on a machine decodes a few JPEGs by each path in a process of its own, compares them
with Pillow, and caches the result beside the kernels' tuning tables, under the versions and the GPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from iwm_fast.errors import UserError
from iwm_fast.kernels import tuning_folder

__all__ = ["DecoderPath", "GpuDecoder", "decode_path", "gpu_decoder", "jpeg_engine", "probe"]

# image_slice decodes the region of the crops; image decodes everything and slices.
DecoderPath = Literal["image_slice", "image"]
_LIMIT_S = 120.0
# (width, height, x, y, w, h): odd sizes, a region at the edge, one in the middle.
_SAMPLES = ((67, 41, 0, 0, 67, 41), (500, 375, 101, 51, 199, 147), (640, 480, 320, 240, 320, 240))
# Mean absolute difference to Pillow in levels: nvJPEG rounds its cosine transform differently from libjpeg.
_TOLERANCE = 2.0


@dataclass(frozen=True)
class GpuDecoder:
    """The path that works, and why a faster one does not (None where the first one does)."""

    path: DecoderPath
    refused: str | None = None


def gpu_decoder(device_id: int) -> GpuDecoder:
    """Return the decoder for a GPU, from this machine's cache, else by :func:`probe`.

    Raises UserError where neither path works: data.device=cpu still does.
    """
    return _known(device_id)


@cache
def _known(device_id: int) -> GpuDecoder:
    file = tuning_folder() / f"gpu-decoder-{_versions(device_id)}.json"
    try:
        return GpuDecoder(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        pass  # not cached yet, or damaged
    found = probe(device_id)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(asdict(found)) + "\n")
        partial.replace(file)
    except OSError:
        pass  # probed again at the next launch
    return found


def _versions(device_id: int) -> str:
    """What the result depends on, as a file name."""
    import torch

    from iwm_fast.environment import installed_version

    parts = [torch.cuda.get_device_name(device_id)]
    parts += [installed_version(name) or "none" for name in ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13")]
    return "-".join(parts).replace(" ", "_").replace("/", "_")


def probe(device_id: int | None, command: Sequence[str] = ()) -> GpuDecoder:
    """Try each path in a process of its own, the faster first. Raises UserError where none decodes as Pillow does.

    device_id: None for DALI's decoders on the CPU. command: replaces this module's, in tests.
    """
    refused: list[str] = []
    for path in get_args(DecoderPath):
        words = [*(command or (sys.executable, "-m", __name__)), path]
        wrong = _tried([*words, *([] if device_id is None else ["--device-id", str(device_id)])])
        if not wrong:
            return GpuDecoder(path, refused[0] if refused else None)
        refused.append(f"{path}: {wrong}")
    raise UserError(
        f"DALI decodes no JPEG on this GPU ({'; '.join(refused)}); set data.device=cpu, or install other versions of "
        "nvidia-dali-cuda130 and nvidia-nvimgcodec-cu13"
    )


def _tried(command: Sequence[str]) -> str:
    """Why the process failed; empty where it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_LIMIT_S:.0f} s"
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
    return "" if done.returncode == 0 else " ".join(last) or f"exit code {done.returncode}"


def jpeg_engine() -> str:
    """Return whether the GPU's JPEG engine is busy while images are decoded, by its driver's counter."""
    return _engine_said(_engine_use())


def _engine_use() -> int | None:
    """Highest use of the JPEG engine in percent while a process decodes; None where the driver does not report it."""
    query = ["nvidia-smi", "--query-gpu=utilization.jpeg", "--format=csv,noheader,nounits"]
    decoding = subprocess.Popen(
        [sys.executable, "-m", __name__, "image", "--device-id", "0", "--seconds", "4"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen: list[int] = []
    try:
        while decoding.poll() is None:
            done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
            seen += [int(word) for word in done.stdout.split() if word.isdigit()]
            if done.returncode:
                break
    except (OSError, subprocess.SubprocessError):
        pass
    finally:
        decoding.kill()
        decoding.wait()
    return max(seen, default=None)


def _engine_said(percent: int | None) -> str:
    if percent is None:
        return "this driver does not report whether its JPEG engine is used"
    return f"JPEG engine up to {percent} % busy" if percent else "its JPEG engine stays idle: nvJPEG's kernels decode"


def decode_path(encoded: Any, start: Any, shape: Any, path: DecoderPath, **options: Any) -> Any:
    """The node of a DALI graph that decodes a region: encoded bytes -> (h, w, 3) uint8.

    start, shape: (2,) int32, x and y in pixels of the stored image. options: of the decoder.
    """
    from nvidia.dali import fn

    if path == "image_slice":
        return fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="WH", **options)
    return fn.slice(fn.decoders.image(encoded, **options), start=start, shape=shape, axis_names="WH")


def _samples() -> list[tuple[NDArray[np.uint8], tuple[int, int, int, int], NDArray[np.uint8]]]:
    """(bytes, region, the region as Pillow decodes it) of a few smooth pictures."""
    made = []
    for width, height, *region in _SAMPLES:
        y, x = np.mgrid[0:height, 0:width]
        levels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(
            np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "JPEG", quality=95)
        left, top, w, h = region
        decoded = np.asarray(Image.open(file))[top : top + h, left : left + w]
        made.append((np.frombuffer(file.getvalue(), np.uint8), (left, top, w, h), decoded))
    return made


def _decode(path: DecoderPath, device_id: int | None, seconds: float = 0.0) -> float:
    """The largest mean absolute difference to Pillow over the samples, in levels; decode again for ``seconds``."""
    from nvidia.dali import fn, pipeline_def, types

    samples = _samples()

    @pipeline_def(batch_size=len(samples), num_threads=2, device_id=device_id)
    def decoded() -> Any:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        start, shape = (fn.external_source(name=n, batch=True, dtype=types.INT32, ndim=1) for n in ("start", "shape"))
        return decode_path(
            encoded, start, shape, path, device="cpu" if device_id is None else "mixed", jpeg_fancy_upsampling=True
        )

    pipeline = decoded()
    pipeline.build()
    regions = np.array([region for _, region, _ in samples], np.int32)
    until = time.monotonic() + seconds
    while True:
        pipeline.feed_input("encoded", [data for data, _, _ in samples])
        pipeline.feed_input("start", np.ascontiguousarray(regions[:, :2]))
        pipeline.feed_input("shape", np.ascontiguousarray(regions[:, 2:]))
        (output,) = pipeline.run()
        if time.monotonic() >= until:
            break
    pixels = output.as_cpu()
    errors = [
        np.abs(np.asarray(pixels[i]).astype(np.int16) - wanted).mean() for i, (_, _, wanted) in enumerate(samples)
    ]
    return float(max(errors))


def main(argv: Sequence[str] | None = None) -> int:
    """Decode by one path and exit: 0 where the pixels are Pillow's, 1 where they are not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", choices=get_args(DecoderPath))
    parser.add_argument("--device-id", type=int)
    parser.add_argument("--seconds", type=float, default=0.0, help="decode again and again, to look at the engine")
    args = parser.parse_args(argv)
    error = _decode(args.path, args.device_id, args.seconds)
    print(f"{error:.2f} levels from Pillow's pixels")
    return int(error > _TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
