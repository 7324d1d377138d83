"""Finds, before a training, the files that it would skip: every file goes through the same reading and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwm_fast.data.clean import MAX_PIXELS, load_clean
from iwm_fast.data.encoded import BadSample, decode_upright, read_bytes
from iwm_fast.data.files import list_images

__all__ = ["verify"]

# Small, so that resizing costs nothing beside decoding; the crop is the whole file but for its longer side's ends.
_SIZE = 32


def verify(
    root: Path, *, device: str = "auto", threads: int | None = None, max_pixels: int = MAX_PIXELS
) -> dict[str, Any]:
    """{files, decoded, bad: [{file, reason}]} of the images below `root`; file is an absolute path.

    A file is bad where training would replace it, and also where only Pillow refuses it (a damage that the pipeline
    would pass over in silence). UserError as `list_images`.
    """
    images = list_images(root)
    reasons: dict[int, str] = {}
    for clean in load_clean(images, _SIZE, device=device, threads=threads, max_pixels=max_pixels):
        reasons |= clean.failed
        for row in clean.rows.tolist():
            try:
                decode_upright(read_bytes(images.paths[row]), max_pixels)
            except BadSample as refused:
                reasons[row] = refused.reason
    bad = [{"file": str(images.paths[row].absolute()), "reason": reasons[row]} for row in sorted(reasons)]
    return {"files": len(images), "decoded": len(images) - len(bad), "bad": bad}
