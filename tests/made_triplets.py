"""Manifests of triplets for tests: small PNGs of the model's own size, so that nothing is resized."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from made_images import encode, picture

HEADER = {
    "schema": "iwm-fast-triplets/1",
    "actions": {"kind": "continuous", "names": ["push", "turn"], "low": [-2, 0], "high": [1, 4]},
}


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_frames(folder: Path, count: int, *, size=(32, 32)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(encode(picture(*size, number), "PNG"))
    return [f"{number:03d}.png" for number in range(count)]


def write_game(folder: Path, episodes: int = 4, steps: int = 6, *, size=(32, 32), discrete: bool = False) -> Path:
    """Write `episodes` of `steps` triplets each to folder/manifest.jsonl, with a header; an episode's frames follow."""
    frames = write_frames(folder / "frames", episodes * (steps + 1), size=size)
    draw = np.random.default_rng(5)
    rows = []
    for episode in range(episodes):
        for step in range(steps):
            place = episode * (steps + 1) + step
            action = int(draw.integers(3)) if discrete else [float(draw.uniform(-2, 1)), float(draw.uniform(0, 4))]
            ends = {"source": f"frames/{frames[place]}", "target": f"frames/{frames[place + 1]}"}
            rows.append({**ends, "action": action, "episode": f"e{episode}", "step": step})
    choices = {"schema": HEADER["schema"], "actions": {"kind": "discrete", "names": ["left", "stay", "right"]}}
    return write_lines(folder / "manifest.jsonl", choices if discrete else HEADER, *rows)


def rows_of_manifest(manifest: Path) -> list[dict]:
    return [row for row in map(json.loads, manifest.read_text().splitlines()) if "schema" not in row]
