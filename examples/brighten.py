"""Brighten images in representation space, and show the nearest views to the prediction.

    python examples/brighten.py runs/a photos/test --out brighten.png

A bank holds every image of the folder three times: darker, unchanged, and brighter. The world model sees the unchanged
image, is conditioned on "brighter", and predicts a representation, never pixels. The picture shows the bank's views
nearest to the prediction; the correct one, the same image brightened, has a green frame. A model that ignores the
action ranks it no nearer than the darker one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import iwm_fast
from iwm_fast.actions.transforms import Jitter
from iwm_fast.data.image_list import list_images
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.world_model.bank import jittered_views

SHOWN = 6


def brightened(images: torch.Tensor, by: float) -> torch.Tensor:
    """Return the images (n, S, S, 3) uint8 with levels times 1 + `by`."""
    still = Jitter.neutral(1)
    jitter = Jitter(still.brightness + np.float32(by), still.contrast, still.saturation, still.hue)
    return torch.cat([jittered_views(image, jitter) for image in images])


def draw(rows: list[tuple[str, list[tuple[np.ndarray, str, bool]]]], path: Path) -> None:
    """Plot a row of pictures per query; those marked true have a green frame."""
    columns = max(len(pictures) for _, pictures in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.35 * columns, 1.6 * len(rows)), squeeze=False, layout="constrained"
    )
    for (title, pictures), line in zip(rows, axes, strict=True):
        for (image, name, true), axis in zip(pictures, line, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(name, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_color("#2e8b57" if true else "#c8ccd2")
                spine.set_linewidth(3 if true else 1)
        line[0].set_ylabel(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run or export")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, default=Path("brighten.png"), help="picture to write")
    parser.add_argument("--by", type=float, default=0.3, help="brightness factor of the target minus the source's")
    parser.add_argument("--count", type=int, default=200, help="images in the bank, spread evenly over the folder")
    parser.add_argument("--distance", choices=("l2", "cosine"), default="l2", help="over all tokens, or their mean")
    parser.add_argument("--queries", type=int, default=5, help="images to brighten and show")
    args = parser.parse_args()

    world = iwm_fast.load(args.run)
    files = list_images(args.images)
    images = world.read(files.take(evenly_spaced(args.count, len(files))))
    count = len(images)
    levels = {f"×{1 - args.by:g}": -args.by, "unchanged": 0.0, f"×{1 + args.by:g}": args.by}
    views = torch.cat([brightened(images, by) for by in levels.values()])  # brighter: the last `count` of 3 · count
    bank = world.targets(views)
    queries = evenly_spaced(args.queries, count)
    ranking = world.rank(images[queries], {"brightness": args.by}, bank, distance=args.distance)

    names = [name for name in levels for _ in range(count)]
    rows = []
    for query, order in zip(queries, ranking.order, strict=True):
        true = 2 * count + int(query)
        place = 1 + int(np.flatnonzero(order == true)[0])
        nearest = [(views[i].numpy(), f"{k}: {names[i]}", i == true) for k, i in enumerate(order[:SHOWN], start=1)]
        shown = [(images[query].numpy(), "source", False), (views[true].numpy(), "brighter", True), *nearest]
        rows.append((f"{place} of {len(views)}", shown))
        print(f"image {query}: the brightened view ranks {place} of {len(views)}")
    draw(rows, args.out)
    found = world.infer(images[queries[0]], views[2 * count + int(queries[0])])
    print(f"inferred action: brightness {found.values['brightness']:+.2f} (true {args.by:+.2f})")
    print(args.out)


if __name__ == "__main__":
    main()
