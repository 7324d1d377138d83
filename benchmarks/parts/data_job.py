"""The work that all implementations of `benchmarks.data` do: images, batches, and their sampled parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from iwm_fast.actions.transforms import Views
from iwm_fast.config import ActionsConfig, Config, DataConfig, ModelConfig, TrainConfig
from iwm_fast.data.order import SampleOrder
from iwm_fast.data.sources.kinds import is_image
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.views.sampling import draw_views

__all__ = ["WARM_UP", "Job"]

# Untimed batches before the timed ones: as many as are prefetched inside and behind the graph.
WARM_UP = 6


@dataclass(frozen=True)
class Job:
    """The work of one repeat: `count` timed batches of `batch` images, at `size` × `size` pixels.

    root: a folder with exactly as many files as a repeat needs; shards: the same files as WebDataset shards.
    sizes: int64 (files, 2), widths and heights in the order of the file names.
    """

    root: Path
    shards: Path
    sizes: np.ndarray
    size: int = 224
    batch: int = 64
    count: int = 6
    device: Literal["cpu", "gpu"] = "cpu"
    seed: int = 0

    @classmethod
    def of(
        cls,
        given: Path,
        out: Path,
        *,
        size: int = 224,
        batch: int = 64,
        count: int = 6,
        device: Literal["cpu", "gpu"] = "cpu",
    ) -> Job:
        """Link the images of folder `given` into out/folder, repeated as needed; pack them into out/shards."""
        root, shards = out / "folder", out / "shards"
        root.mkdir(parents=True)
        files = sorted(file for file in given.iterdir() if is_image(file.name))
        images, sizes = batch * (WARM_UP + count), []
        for number in range(images):
            file = files[number % len(files)]
            (root / f"{number:06d}{file.suffix}").symlink_to(file.absolute())
            with Image.open(file) as image:
                sizes.append(image.size)
        write_shards(root, shards)
        return cls(root, shards, np.array(sizes, np.int64), size, batch, count, device)

    @property
    def images(self) -> int:
        """Images of one repeat, warm-up included."""
        return self.batch * (WARM_UP + self.count)

    def config(self, threads: int) -> Config:
        """Ours."""
        return Config(
            model=ModelConfig(image=self.size),
            data=DataConfig(device=self.device, threads=threads),
            train=TrainConfig(seed=self.seed, global_batch=self.batch),
        )

    def drawn(self, repeat: int) -> tuple[list[Path], Views]:
        """Return what `TrainingStream` makes in a repeat: files in its order, and their parameters."""
        paths = sorted(self.root.iterdir())
        ids, epochs = SampleOrder(self.seed, len(paths))(repeat * self.images, (repeat + 1) * self.images)
        views = draw_views(ActionsConfig(), self.seed, epochs, ids, self.sizes[ids])
        return [paths[i] for i in ids.tolist()], views
