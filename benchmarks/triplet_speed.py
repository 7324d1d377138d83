"""Images per second of training on triplets, over those of training on the same pictures as images, at equal tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.triplet_speed --scratch SCRATCH --json FILE [KEY=VALUE ...]

Generates pictures of a ball that moves (PNG), of which each is the target of one triplet and the source of the next.
Both trainings have the same network and masks, so that their tokens are equal; a triplet has two pictures, an image
one, of which two views are made. They run in turn, in this process, from files through DALI as `pretrain` does. Also
reported: processor seconds, and how many pictures are decoded per image. The pictures are removed afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config, load_config
from iwm_fast.config.load import find_config
from iwm_fast.config.schema import ExternalActions
from iwm_fast.data.triplet_manifest import write_manifest
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.measure.batches import described, opened_stream
from iwm_fast.measure.device import only_rank
from iwm_fast.measure.harness import prepare_trainer, settle
from iwm_fast.measure.stats import ratio_of
from iwm_fast.outputs import require_new_folder, require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

# Masks that images and triplets may both have: one of the blocks is hidden.
MASKS = ("masks.target_blocks=4", "masks.visible_blocks=3")
KINDS = {
    "images": ("actions.groups=[photometric]", "data.source=folder"),
    "triplets": ("actions.groups=[external]", "data.source=triplets"),
}
_WARM_UP, _EPISODE = 5, 12


def draw(folder: Path, frames: int, size: int) -> Path:
    """Write `frames` pictures of size × size pixels, in episodes of twelve triplets, and their manifest."""
    rng = np.random.default_rng(0)
    (folder / "frames").mkdir(parents=True)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1)
    ground = rng.integers(60, 190, (size // 8 + 1, size // 8 + 1, 3)).repeat(8, axis=0).repeat(8, axis=1)[:size, :size]
    rows: list[dict[str, Any]] = []
    place, action, before = np.zeros(2), np.zeros(2), None
    for number in range(frames):
        episode, step = divmod(number, _EPISODE + 1)
        if step == 0:
            place, before = rng.uniform(0.2, 0.8, 2) * size, None
        else:
            action = rng.uniform(-1, 1, 2)
            place = np.clip(place + action * size / 10, 0, size - 1)
        near = np.linalg.norm(grid - place, axis=2) < size / 10
        name = f"frames/{number:06d}.png"
        Image.fromarray(np.where(near[..., None], 255, ground).astype(np.uint8)).save(folder / name)
        if before is not None:
            ends = {"source": before, "target": name, "action": action.tolist()}
            rows.append({**ends, "episode": episode, "step": step - 1})
        before = name
    box = {"low": (-1.0, -1.0), "high": (1.0, 1.0), "neutral": (0.0, 0.0)}
    manifest = folder / "manifest.jsonl"
    write_manifest(manifest, ExternalActions(kind="continuous", names=("down", "right"), **box), rows)
    return manifest


def timed(config: Config, root: Path, ranks: Ranks, steps: int) -> dict[str, Any]:
    """Return the seconds, processor seconds and decoded pictures of `steps` steps together, and their images/s."""
    quiet = config.model_copy(update={"log": config.log.model_copy(update={"every_steps": 10**9})})
    quiet, triplets = described(quiet, root)
    space, decoded, submit = space_of(quiet.actions), [0], ViewGraph.submit

    def counting(graph: ViewGraph, encoded: Any, views: Any) -> None:
        decoded[0] += len(encoded)
        submit(graph, encoded, views)

    with opened_stream(quiet, space, ranks, root, triplets) as stream:
        trainer = prepare_trainer(quiet, space, stream, ranks)
        settle(trainer, _WARM_UP)
        ViewGraph.submit = counting  # type: ignore[method-assign,assignment]
        try:
            began, used = time.perf_counter(), time.process_time()
            for _ in range(steps):
                trainer.train_step()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
        finally:
            ViewGraph.submit = submit  # type: ignore[method-assign]
    images = steps * config.train.global_batch
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "images_per_s": images / seconds,
        "decoded_per_image": decoded[0] / images,
    }


def measure(
    config: str, keys: list[str], folder: Path, ranks: Ranks, rounds: int, steps: int, *, frames: int, size: int
) -> dict[str, Any]:
    """Return every round of both, and the ratio of images/s."""
    draw(folder, frames, size)
    common = [*MASKS, f"data.root={folder}", *keys]
    configs = {kind: load_config(find_config(config), [*common, *own]) for kind, own in KINDS.items()}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, one in configs.items():
            root = folder if kind == "triplets" else folder / "frames"
            found[kind].append(timed(one, root, ranks, steps))
    rates, cpu = (
        {k: [run[key] for run in runs] for k, runs in found.items()} for key in ("images_per_s", "cpu_seconds")
    )
    ratio = ratio_of(rates["triplets"], rates["images"], paired=True)
    return {
        "config": config,
        "keys": keys,
        "frames": frames,
        "size": size,
        "rounds": found,
        "speed_ratio": ratio.value,
        "speed_ratio_interval": [ratio.low, ratio.high],
        "cpu_speed_ratio": ratio_of(cpu["images"], cpu["triplets"], paired=True).value,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="override keys of both")
    parser.add_argument("--config", default="game.yaml")
    parser.add_argument("--scratch", type=Path, required=True, help="a new folder for the pictures")
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--frames", type=int, default=1625)
    parser.add_argument("--size", type=int, default=64, help="of the pictures, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round, each")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    require_result(args.json)
    require_new_folder(args.scratch)
    ranks = only_rank(args.device, args.threads)
    try:
        body = measure(
            args.config, args.keys, args.scratch, ranks, args.rounds, args.steps, frames=args.frames, size=args.size
        )
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)
    write_result(args.json, "triplet-speed", body)
    low, high = body["speed_ratio_interval"]
    print(
        f"triplets over images: {body['speed_ratio']:.3f} ({low:.3f} to {high:.3f}) of the images/s, "
        f"{body['cpu_speed_ratio']:.3f} by processor time",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.triplet_speed", main))
