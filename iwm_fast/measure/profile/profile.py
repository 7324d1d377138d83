"""Some training steps, looked at in four ways, each in steps of its own so that none is in another's numbers."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.metrics.throughput import peak_flops
from iwm_fast.errors import UserError
from iwm_fast.kernels import TRITON_FUNCTIONS
from iwm_fast.measure.batches import described, opened_stream
from iwm_fast.measure.collective_time import timed_collectives
from iwm_fast.measure.harness import prepare_trainer, settle
from iwm_fast.measure.operations import OperationCounter
from iwm_fast.measure.profile.limits import Limits
from iwm_fast.measure.profile.parts import PARTS, measured_parts
from iwm_fast.measure.profile.picture import draw_step
from iwm_fast.measure.profile.tables import markdown, module_rows, operator_rows
from iwm_fast.measure.profile.trace import Traced, trace_steps
from iwm_fast.measure.timing import ceilings, clocked
from iwm_fast.outputs import require_folder

__all__ = ["ncu_command", "profile"]

_WARM_UP = 3
_SKIPPED = 20  # launches before the one that Nsight Compute looks at
_TRACED = 2  # steps in the trace: their files grow by megabytes each


def profile(
    config: Config, out: Path, ranks: Ranks, *, root: Path | None = None, steps: int = 10,
    say: Callable[[str], object] = print, keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write trace.json, profile.md, step.png and memory.json into `out`; returns the figures of profile.json's body.

    In order: `steps` steps by the clock alone, as many in parts, one counted, two traced. ``keep`` gets the figures
    before the files are written. UserError, before anything is measured, where they could not be.
    """
    require_folder(out, read=config.data.root if root is None else root)
    out.mkdir(parents=True, exist_ok=True)
    quiet = config.model_copy(update={"log": config.log.model_copy(update={"every_steps": 10**9})})
    quiet, triplets = described(quiet, root)
    space = space_of(quiet.actions)
    device, peak = ranks.device, peak_flops(ranks.device)
    with timed_collectives() as said, opened_stream(quiet, space, ranks, root, triplets) as stream:
        trainer = prepare_trainer(quiet, space, stream, ranks)
        say(f"warming up for {_WARM_UP} steps")
        if config.train.cuda_graph:
            settle(trainer, _WARM_UP)
        else:
            for _ in range(_WARM_UP):
                trainer.train_step()
        taken = [clocked(trainer.train_step, device).seconds for _ in range(steps)]
        # A replay calls no module and no operator: parts and counts are those of the same step without graphs.
        graphed = trainer.zero.graphed
        eager = graphed.eager if graphed else contextlib.nullcontext
        with eager(), measured_parts(trainer, said) as clock:
            for _ in range(steps):
                with clock.step():
                    trainer.train_step()
        say("counting operations and bytes")
        # A mode that sees every operator cannot look into compiled code: the plain one does the same work.
        plain = torch.compiler.set_stance("force_eager") if config.train.compile else contextlib.nullcontext()
        with eager(), plain, OperationCounter() as counter:
            trainer.train_step()
        say("tracing")
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history()  # noqa: SLF001  (the documented way to a snapshot)
        model = trainer.zero.module
        with eager():
            traced = trace_steps(trainer.train_step, model, device, _TRACED, counter.by_operator.keys())
    measured = ceilings(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    middle, whole = clock.middle()
    parts = {part: middle.get(part, 0.0) for part in PARTS}
    document = {
        "images": config.train.global_batch,
        "sources_per_target": config.views.sources_per_target,
        "device": device.type,
        "static_shapes": config.train.static_shapes,
        "cuda_graph": config.train.cuda_graph,
        "data": "synthetic" if root is None else "files",
        "step_s": median(taken),
        "steps_s": taken,
        "parts_s": parts,
        "parts_sum_s": sum(parts.values()),
        "parts_step_s": whole,
        "parts_of_each_step_s": clock.steps,
        "operations": sum(work.operations for work in counter.by_operator.values()),
        "bytes": sum(work.bytes for work in counter.by_operator.values()),
        "ceilings": {key: value for key, value in measured.items() if not key.endswith("_seconds")},
        "peak_flops_per_s": peak,
        **_tables(traced, counter, Limits.of(measured), peak),
        "memory_peak_bytes": max((held for _, held in traced.memory), default=0),
    }
    if keep is not None:
        keep(document)
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(out / "memory_snapshot.pickle"))  # noqa: SLF001
        torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
    _write(document, traced, out)
    return document


def _tables(traced: Traced, counter: OperationCounter, limits: Limits, peak: float | None) -> dict[str, Any]:
    kernels = sorted(traced.kernels.items(), key=lambda item: -item[1][0])
    return {
        "operators": operator_rows(traced.operators, traced.counted, counter.by_operator, limits, peak),
        "kernels": [{"name": kernel, "seconds": row[0], "calls": row[1]} for kernel, row in kernels],
        "modules": module_rows(traced.modules, counter.modules_of("predictor"), limits, peak),
    }


def _write(document: Mapping[str, Any], traced: Traced, out: Path) -> None:
    traced.profiler.export_chrome_trace(str(out / "trace.json"))
    (out / "profile.md").write_text(markdown(document), encoding="utf-8")
    timeline = {"unit": "bytes above the first traced step's start", "timeline": traced.memory}
    (out / "memory.json").write_text(json.dumps(timeline), encoding="utf-8")
    count = len(document["parts_of_each_step_s"])
    draw_step(document["parts_s"], document["parts_step_s"], count, traced.memory, out / "step.png")


def ncu_command(kernel: str, config: str, overrides: Sequence[str], out: Path) -> str:
    """The Nsight Compute command that looks at one launch of one of our Triton functions in a training step.

    It runs `bench step`, because two profilers cannot share the GPU's counters. The first launches are skipped: a step
    has at least one of each function that it uses, and takes more of them than are skipped. UserError for a name that
    is none.
    """
    if kernel not in TRITON_FUNCTIONS:
        raise UserError(f"--ncu: {kernel}: no such kernel; there are {', '.join(TRITON_FUNCTIONS)}")
    words = ["ncu", "--set", "full", "--target-processes", "all", "--kernel-name", f"regex:^{kernel}$"]
    words += ["--launch-skip", str(_SKIPPED), "--launch-count", "1", "--force-overwrite", "--export", str(out / kernel)]
    words += ["python", "-m", "iwm_fast", "bench", "step", "--config", config, *overrides]
    return shlex.join([*words, "--device", "cuda", "--warm-up", "3", "--repeats", str(_SKIPPED)])
