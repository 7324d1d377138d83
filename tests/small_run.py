"""A run small enough for tests, and functions to compare two of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from iwm_fast.benchmarks.index import TINY
from iwm_fast.config import Config
from iwm_fast.engine.checkpoint.format import Checkpoint

BASE = {
    "model": {
        "encoder": {"depth": 2, "width": 32, "heads": 2},
        "patch": 8,
        "image": 32,
        "predictor": {"depth": 2, "width": 32, "heads": 2, "conditioning": "feature"},
    },
    "masks": {"min_context": 2},
    "data": {"device": "cpu", "threads": 1},
    "train": {
        "seed": 3,
        "epochs": 4.0,
        "global_batch": 8,
        "precision": "fp32",
        "lr": 2e-3,
        "warmup": 2,
        "ema": [0.9, 0.99],
        "schedule_steps": 20,
    },
    "zero": {"stage": 0},
    "log": {"every_steps": 1, "tensorboard": False},
    "checkpoint": {"every_steps": 1000, "keep_last": 3},
}

# The smallest run as arguments of the command line.
TINY_WORDS = (*TINY, "data.threads=1")


def small_config(root: Path, **changes: object) -> Config:
    """Return the small configuration with ``changes`` by dotted key with __ for the dot: ``train__steps=5``."""
    tree = json.loads(json.dumps(BASE))
    tree["data"]["root"] = str(root)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return Config.model_validate(tree)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run)]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, whole."""
    saved = Checkpoint(run / "checkpoints" / f"step_{step:06d}")
    return {key: saved.full(*key.split("/", 1)) for key in saved.shapes}
