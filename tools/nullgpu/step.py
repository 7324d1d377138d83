"""What the training step of a preset launches, waits for and costs its host, on the null GPU."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.step import Spans, Trainer
from iwm_fast.environment import environment
from iwm_fast.log_filters import quiet_third_parties
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import synthetic_stream
from tools.nullgpu.counters import Counts, compiled, counts

# The first steps compile, tune and allocate; the last of them are what a long run repeats.
STEPS, STEADY = 8, 3
_OURS = ("iwm_fast", "kernels", "benchmarks", "deepspeed", "xformers")


def measure(preset: str, overrides: Sequence[str], steps: int = STEPS) -> dict[str, Any]:
    """One row: every step's counts, the median of the last, the parts of one step, and where the host waits."""
    ranks = start()
    config = preset_config(preset, (*overrides, "log.every_steps=1000000"))
    space = space_of(config.actions)
    stream = synthetic_stream(config, space, ranks.device, steps=steps)
    trainer = prepare_trainer(config, space, stream, ranks)
    rows: list[dict[str, float]] = []
    new: list[list[str]] = []
    for _ in range(steps):
        before = len(compiled())
        rows.append(_counted(trainer))
        new.append(compiled()[before:])
    steady = {key: median(row[key] for row in rows[-STEADY:]) for key in rows[0]}
    parts = _by_part(trainer)
    return {
        "preset": preset,
        "overrides": list(overrides),
        "stage": config.zero.stage,
        "images": config.train.global_batch,
        "sources_per_target": config.views.sources_per_target,
        "step": steady,
        "steps": rows,
        "compiled": new,
        "parts": parts,
        "waits_at": _waits(trainer),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _counted(trainer: Trainer) -> dict[str, float]:
    before = counts()
    trainer.train_step()
    return (counts() - before).row()


def _by_part(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The counts of one step by the spans that the training loop names."""
    found: dict[str, Counts] = collections.defaultdict(Counts)

    class CountedSpans(Spans):
        @contextlib.contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            before = counts()
            with super().__call__(name):
                yield
            found[name] += counts() - before

    shipped, trainer.new_spans = trainer.new_spans, CountedSpans
    trainer.train_step()
    trainer.new_spans = shipped
    return {name: part.row() for name, part in found.items()}


def _waits(trainer: Trainer) -> dict[str, int]:
    """Lines of ours at which PyTorch makes the host wait for the device, with how often in one step."""
    seen: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if any(word in f.filename for word in _OURS)]
        last = frames[-3:][::-1]
        seen[" <- ".join(f"{Path(f.filename).name}:{f.name}" for f in last) or str(message)[:80]] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("default")
    return dict(seen)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: PRESET [KEY=VALUE ...] [--steps N] [--json FILE]."""
    parser = argparse.ArgumentParser(prog="python -m tools.nullgpu step", description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    quiet_third_parties()
    found = measure(args.preset, args.overrides, args.steps)
    for i, row in enumerate(found["steps"]):
        print(f"step {i}:", _said(row))
        if i and found["compiled"][i]:
            print(f"step {i} compiled:", ", ".join(found["compiled"][i]))
    for name, part in found["parts"].items():
        print(f"{name}:", _said(part))
    for place, times in found["waits_at"].items():
        print(f"waits {times} × at {place}")
    print(f"steady, stage {found['stage']}:", _said(found["step"]))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), **found}) + "\n")
    return 0


def _said(row: dict[str, float]) -> str:
    counted = ", ".join(f"{name} {row[name]:g}" for name in row if not name.endswith("_s") and row[name])
    return f"{counted}; host {row['host_s'] * 1e3:.0f} ms, process {row['process_s'] * 1e3:.0f} ms"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the libraries' own destructors wait for a device that is not there
