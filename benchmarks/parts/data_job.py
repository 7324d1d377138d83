"""What every baseline of `benchmarks.data` does: which images, how many batches, and what is drawn for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from iwm_fast.actions.transforms import Views
from iwm_fast.config import ActionsConfig, Config, DataConfig, ModelConfig, TrainConfig
from iwm_fast.data.loader import SampleOrder
from iwm_fast.data.sources.kinds import is_image
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.data.views.sampling import draw_views

__all__ = ["WARM_UP", "Job"]

# Batches that do not count, before the timed ones: as many as are prepared ahead, in the graph and behind it.
WARM_UP = 6


@dataclass(frozen=True)
class Job:
    """What every contender does: `count` timed batches of `batch` images, at `size` pixels a side.

    root: a folder with as many files as a repeat needs, nothing else; shards: the same files as WebDataset shards.
    sizes: int64 (files, 2), their widths and heights in the order of the files' names.
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
        """Links to the images of the folder `given` in out/folder, each as often as it takes; out/shards of them."""
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
        """Images of one repeat, those that do not count included."""
        return self.batch * (WARM_UP + self.count)

    def config(self, threads: int) -> Config:
        """Ours."""
        return Config(
            model=ModelConfig(image=self.size),
            data=DataConfig(device=self.device, threads=threads),
            train=TrainConfig(seed=self.seed, global_batch=self.batch),
        )

    def drawn(self, repeat: int) -> tuple[list[Path], Views]:
        """What `TrainingStream` makes in a repeat: files in its order, and their parameters."""
        paths = sorted(self.root.iterdir())
        ids, epochs = SampleOrder(self.seed, len(paths))(repeat * self.images, (repeat + 1) * self.images)
        views = draw_views(ActionsConfig(), self.seed, epochs, ids, self.sizes[ids])
        return [paths[i] for i in ids.tolist()], views
