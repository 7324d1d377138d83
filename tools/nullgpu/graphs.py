"""Whether what `train.cuda_graph` captures could be: no wait, no upload, no compilation inside, and nothing that moves.

    python -m tools.nullgpu graphs PRESET [KEY=VALUE ...] [--json FILE]

The null GPU has no graphs. In their place each replay runs the work again, counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from iwm_fast.actions.external import space_of
from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.engine import zero
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.step import Trainer
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import synthetic_stream
from tools.nullgpu.counters import Counts, counts

Made = TypeVar("Made")
STEPS, BATCHES = 14, 2


class Counting:
    """A recorder that runs the work again at each replay. replays: what each counted."""

    def __init__(self) -> None:
        self.replays: list[Counts] = []

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """As `graphs.Recorder`."""

        def replay() -> None:
            before = counts()
            work()
            self.replays.append(counts() - before)

        return work(), replay


def measure(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Counts of the last replay, and how many addresses of weights, buffers and gradients moved in the last steps."""
    config = preset_config(
        preset, ("train.static_shapes=true", "train.cuda_graph=true", *overrides, "log.every_steps=1000000")
    )
    recorder = Counting()
    zero.CudaRecorder = lambda: recorder  # type: ignore[assignment,misc]
    space, ranks = space_of(config.actions), start()
    trainer = prepare_trainer(
        config, space, synthetic_stream(config, space, ranks.device, steps=BATCHES), ranks
    )  # fmt: skip
    places = []
    for _ in range(STEPS):
        trainer.train_step()
        places.append(_places(trainer))
    graphed = trainer.zero.graphed
    assert graphed is not None
    moved = sum(a != b for a, b in zip(places[-1], places[-2], strict=True))
    return {
        "preset": preset,
        "overrides": list(overrides),
        "captures": graphed.captures,
        "replays": len(recorder.replays),
        "sizes": sorted(trainer.packer.sizes),
        "replay": recorder.replays[-1].row() if recorder.replays else None,
        "moved": moved,
    }


def _places(trainer: Trainer) -> list[int]:
    graphed = trainer.zero.graphed
    assert graphed is not None
    held = [*trainer.zero.module.parameters(), *graphed.buffers_read()]
    return [tensor.data_ptr() for tensor in held]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 where a graph could not be captured."""
    parser = argparse.ArgumentParser(prog="python -m tools.nullgpu graphs", description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    quiet_third_parties()
    found = measure(args.preset, args.overrides)
    print(found)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    replay = found["replay"]
    refused = replay is None or found["moved"] or any(replay[key] for key in ("waits", "uploads", "variants"))
    return 1 if refused else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the libraries' own destructors wait for a device that is not there
