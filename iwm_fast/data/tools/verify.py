"""Finds, before a training, the files that it would skip: every file goes through the same reading and decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iwm_fast.data.decode.encoded import MAX_PIXELS
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import list_images

__all__ = ["verify"]

# Small, so that resizing costs nothing beside decoding; the crop is the whole file but for its longer side's ends.
_SIZE = 32


def verify(
    root: str | Path,
    *,
    source: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_pixels: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Any]:
    """{files, decoded, bad: [{file, reason}], source, left_out: [{count, reason, examples}]} of what is below `root`.

    file is the sample's full name. A file is bad where training on this device would replace it, and only there: the
    same code reads, checks and decodes it, as a whole. UserError as `list_images`.
    """
    images = list_images(root, source)
    reasons: dict[int, str] = {}
    done = 0
    for clean in load_clean(images, _SIZE, device=device, threads=threads, max_pixels=max_pixels or MAX_PIXELS):
        reasons |= clean.failed
        done += len(clean.rows) + len(clean.failed)
        if progress is not None:
            progress("verify", done, len(images))
    bad = [{"file": images.name(row), "reason": reasons[row]} for row in sorted(reasons)]
    return {
        "files": len(images),
        "decoded": len(images) - len(bad),
        "bad": bad,
        "source": images.source.describe(),
        "left_out": images.source.left_out.rows(),
    }
