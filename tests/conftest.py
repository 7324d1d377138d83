"""What every test shares: the settings of libraries before they are imported, and a few small images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from iwm_fast.quiet import quiet_third_parties

os.environ.setdefault("MPLBACKEND", "Agg")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_third_parties()
# A first example pays for imports, and CI must say the same of the same commit each time.
settings.register_profile("iwm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("iwm")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of twelve JPEGs each: gradients of two colours with noise, sides of 40 to 63 pixels."""
    root = tmp_path_factory.mktemp("tiny_images")
    random = np.random.default_rng(0)
    for label, colour in (("cold", (40, 90, 220)), ("warm", (230, 120, 30))):
        folder = root / label
        folder.mkdir()
        for i in range(12):
            height, width = random.integers(40, 64, size=2)
            ramp = np.linspace(0.3, 1.0, width)[None, :, None]
            levels = np.asarray(colour) * ramp + random.normal(0, 12, (height, width, 3))
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=95)
    return root
