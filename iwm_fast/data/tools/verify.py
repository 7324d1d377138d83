"""Find the files that a training would skip, by reading and decoding every file as it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iwm_fast.data.decode.encoded import MAX_PIXELS
from iwm_fast.data.eval_images import load_clean
from iwm_fast.data.image_list import list_images

__all__ = ["verify"]

# Small, so that resizing is fast beside decoding. The crop is the largest centred square.
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
    """Return {files, decoded, bad: [{file, reason}], source, left_out: [{count, reason, examples}]} for `root`.

    file is the sample's full name. A file is bad if and only if training on this device would replace it: the same code
    reads, checks and decodes it. Raises UserError as `list_images`.
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
