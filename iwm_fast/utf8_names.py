"""Files for libraries that take names in UTF-8 alone, as safetensors, TensorBoard and onnxruntime do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iwm_fast.streams import shown

__all__ = ["utf8_name"]


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of ``path`` that is UTF-8: its own, or where its folder's is not, one by way of an open descriptor.

    ``path``'s folder has to be there; the name is good inside the block.
    """
    name = str(path)
    if shown(name) == name:
        yield name
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
