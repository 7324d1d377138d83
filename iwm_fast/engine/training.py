"""One start of a training: from a configuration and a folder to a run with its checkpoints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from iwm_fast.actions import ActionSpace
from iwm_fast.config import Config
from iwm_fast.config.cores import usable_cores
from iwm_fast.data.external import space_of
from iwm_fast.data.files import ImageSet, list_images
from iwm_fast.data.layout import tell_of_splits
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.pairs import PairStream
from iwm_fast.data.sources import Patience
from iwm_fast.data.triplets import Triplets, resolve_triplets
from iwm_fast.engine import checkpoint
from iwm_fast.engine.checkpoint import Checkpoint
from iwm_fast.engine.checkpoint_writer import CheckpointWriter, clear_leftovers, point_latest
from iwm_fast.engine.clock import seconds_since_start
from iwm_fast.engine.distributed import Ranks, agree, gather, start
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.interconnect import Interconnect, far_below, measure_interconnect
from iwm_fast.engine.launch import require_shared
from iwm_fast.engine.liveness import Liveness
from iwm_fast.engine.loop import Trainer
from iwm_fast.engine.metrics import MetricsLog
from iwm_fast.engine.monitor import evaluate_during_training
from iwm_fast.engine.progress import TrainingProgress
from iwm_fast.engine.provenance import describe_run
from iwm_fast.engine.readiness import require_ready, require_room
from iwm_fast.engine.rundir import RunDirectory
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.signals import StopRequest
from iwm_fast.engine.sinks import open_sinks
from iwm_fast.engine.skipped import SkippedSteps
from iwm_fast.engine.state import fragments, restore_module, restore_shards
from iwm_fast.engine.stragglers import Stragglers
from iwm_fast.engine.trained import require_machine, trained_model
from iwm_fast.engine.upkeep import Upkeep
from iwm_fast.engine.zero import ZeroEngine, initialize
from iwm_fast.errors import UserError
from iwm_fast.models.attention import resolve_backend
from iwm_fast.planning.conflicts import conflicts, require_a_step
from iwm_fast.planning.length import training_steps

__all__ = ["pretrain"]

Decided = TypeVar("Decided")


@dataclass
class Run:
    """What a start has built."""

    config: Config
    directory: RunDirectory
    ranks: Ranks
    zero: ZeroEngine
    average: TargetAverage | None
    trainer: Trainer
    writer: CheckpointWriter
    live: Liveness
    stop_at: int


def pretrain(config: Config, out: Path, resume: str = "never") -> None:
    """Train into folder ``out``, alone or as one rank of many.

    ``resume``: ``never`` (refused when ``out`` has checkpoints), ``auto`` (the newest whole one, or anew), or a
    checkpoint's path. Raises UserError for whatever the user can mend.
    """
    ranks = start(config.train.rank_timeout_s)
    if "OMP_NUM_THREADS" not in os.environ and ranks.device.type == "cpu":
        torch.set_num_threads(max(1, usable_cores() // ranks.local_world))
    if config.data.root is None:
        raise UserError("data.root is not set: name the folder of images, for example data.root=photos/train")
    require_machine(config, ranks.device)  # here, before anything is written
    directory = RunDirectory(out)
    live = Liveness(ranks, config.train.rank_timeout_s)
    with contextlib.ExitStack() as held, live.watching():
        measured = measure_interconnect(ranks, live, config.train.rank_timeout_s)
        slow = far_below(measured.links, ranks.peers) if measured else None
        if slow and ranks.first:
            print(slow, file=sys.stderr, flush=True)
        live.at("reading of the configuration's data")
        config, triplets = resolve_triplets(config)

        def choose() -> Path | None:
            held.enter_context(directory.locked())
            require_ready(config, directory)
            return _prepare(config, directory, resume, ranks, measured)

        chosen = _decide(ranks, choose)
        require_shared(directory.path, ranks.peers, ranks.rank, lambda value: gather(value, ranks.world))
        _train(config, directory, chosen, ranks, live, triplets)


def _decide(ranks: Ranks, choose: Callable[[], Decided]) -> Decided:
    """The first rank chooses for all; what it could not do ends every rank with its words."""
    answer: list[Any] = [None, None]
    if ranks.first:
        try:
            answer[0] = choose()
        except UserError as error:
            answer[1] = str(error)
    if ranks.world > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    decided: Decided = answer[0]
    return decided


def _prepare(
    config: Config, directory: RunDirectory, resume: str, ranks: Ranks, measured: Interconnect | None
) -> Path | None:
    """Choose the checkpoint to go on from and write what describes the run."""
    found, passed = checkpoint.newest(directory.checkpoints) if directory.checkpoints.is_dir() else (None, [])
    if resume == "never":
        if found or passed:
            raise UserError(
                f"{directory.path}: has checkpoints already; go on with --resume auto, or choose another --out"
            )
        chosen = None
    elif resume == "auto":
        for line in passed:
            print(f"passed over a damaged checkpoint: {line}", flush=True)
        if passed and found is None:
            raise UserError(
                f"{directory.checkpoints}: no whole checkpoint is left ({passed[0]}); "
                "restore one, or choose another --out"
            )
        chosen = found
    else:
        chosen = Path(resume)
        wrong = checkpoint.damage(chosen)
        if wrong:
            raise UserError(f"{chosen}: {wrong}; name another checkpoint")
        if chosen.resolve().parent == directory.checkpoints.resolve():
            point_latest(directory.checkpoints, chosen.name)  # killed before its next one, auto goes on from here
    if chosen is not None and directory.config_file.exists():
        directory.require_same(config)
    clear_leftovers(directory.checkpoints)
    step = Checkpoint(chosen).step if chosen is not None else 0
    directory.drop_metrics_after(step)
    directory.begin(config, describe_run(directory.environment_file, config, ranks, step, measured))
    return chosen


def _train(
    config: Config,
    directory: RunDirectory,
    chosen: Path | None,
    ranks: Ranks,
    live: Liveness,
    triplets: Triplets | None,
) -> None:
    live.at("listing of the data")
    patience = Patience(config.data.store_timeout, config.data.store_attempts)
    files = triplets or list_images(config.data.root or "", config.data.source, patience)
    require_a_step(config, len(files))
    if triplets is None:
        tell_of_splits(config.data.root or "", "all of them are trained on")
    live.at("making of the model")
    space = space_of(config.actions)
    model = trained_model(config, space.dim, ranks.device)
    _decide(ranks, lambda: require_room(model, directory.checkpoints))
    saved = Checkpoint(chosen) if chosen is not None else None
    done, updates = (saved.step, saved.updates) if saved else (0, 0)
    schedules = Schedules(config.train, training_steps(config, len(files)))
    stop_at = config.train.steps or schedules.total
    live.at("opening of the data")
    stream = (PairStream if isinstance(files, Triplets) else TrainingStream)(
        config,
        files,
        space,
        rank=ranks.rank,
        world=ranks.world,
        start=done * config.train.global_batch,
        run_dir=directory.path,
    )
    keep = config.checkpoint
    writer = CheckpointWriter(directory.checkpoints, ranks, keep.keep_last, keep.keep_every)
    skipped = SkippedSteps(config.train.max_skipped, directory.skipped_file, ranks)
    with contextlib.closing(stream), contextlib.closing(writer):
        predicts = model.predicts
        live.at("making of the engine")
        if saved:
            restore_module(model, saved)
        zero = initialize(model, config, stream.micro_batch, stream.accumulation)
        average = TargetAverage(zero, ranks) if config.model.target == "ema" else None
        if saved:
            live.at("reading of the checkpoint")
            restore_shards(zero, average, saved)
        trainer = Trainer(
            config, zero, average, stream, schedules, ranks, live=live, skipped=skipped,
            predicts=predicts, action_dim=space.dim, dataset_size=len(files), step=done, updates=updates,
        )  # fmt: skip
        run = Run(config, directory, ranks, zero, average, trainer, writer, live, stop_at)
        with TrainingProgress(stop_at, done, shown=ranks.first) as progress:
            _announce(run, files, saved, progress)
            # Only from here on is there a state to save: a start that is told to stop just ends.
            with StopRequest() as stop, Upkeep() as upkeep, live.watching():
                _loop(run, space, progress, stop, upkeep)


def _announce(run: Run, files: ImageSet | Triplets, saved: Checkpoint | None, progress: TrainingProgress) -> None:
    config = run.config
    attention = resolve_backend(config.model.attention, run.ranks.device.type)
    in_fp8 = ", target in fp8" if config.model.target_precision == "fp8" else ""
    progress.say(
        f"{len(files)} {files.describe()}, {run.ranks.world} rank(s) on {run.ranks.device.type}, "
        f"ZeRO stage {config.zero.stage}, {config.train.precision}{in_fp8}, attention {attention}, "
        f"{'compiled, ' if config.train.compile else ''}"
        f"global batch {config.train.global_batch} = "
        f"{run.ranks.world} × {run.trainer.stream.accumulation} × {run.trainer.stream.micro_batch}"
    )
    for line in conflicts(config, len(files)):
        progress.say(f"note: {line}")
    if saved and saved.index.get("images", len(files)) != len(files):
        progress.say(
            f"the data have {len(files)} images now and had {saved.index['images']} when the checkpoint was written: "
            "what is left of the order is another one (iwm-fast data index keeps the list as it is)"
        )
    if saved:
        progress.say(f"resumed from {saved.path}: the next step is {run.trainer.step + 1} of {run.stop_at}")
    if run.trainer.step >= run.stop_at:
        progress.say(f"nothing to do: {run.trainer.step} steps are done; raise train.steps to go on")


def _loop(run: Run, space: ActionSpace, progress: TrainingProgress, stop: StopRequest, upkeep: Upkeep) -> None:
    config, trainer, ranks = run.config, run.trainer, run.ranks
    first = trainer.step + 1
    log = _open_log(run) if ranks.first else None
    stragglers = Stragglers(config.log.straggler_ratio)
    stopping = False
    trainer.restart_clock()
    while trainer.step < run.stop_at:
        record = trainer.train_step()
        run.live.started()
        upkeep.after(trainer.step)
        if record and trainer.step == first:
            record["first_step_after_s"] = seconds_since_start()
        stopping, write_failed = agree(ranks, stop.asked, run.writer.failed)
        if write_failed:
            run.writer.wait()
        if _due(config.eval.every_steps, trainer.step) and config.eval.root:
            record = _evaluated(run, space, record, log)
            trainer.restart_clock()
        if record and log:
            slow = stragglers.look(record.pop("own_s_by_rank", [0.0]), record.get("step_s", 0.0))
            if slow:
                progress.say(_named(slow, record["step"], ranks))
            log.write(record)
            _warn_of_collapse(record, config, progress)
        progress.step(trainer.step, record if record and "loss" in record else None)
        if stopping or trainer.step == run.stop_at or _due(config.checkpoint.every_steps, trainer.step):
            if log:
                log.sync()
            _save(run)
            trainer.restart_clock()
        if stopping:
            break
    run.live.at("writing of the last checkpoint")
    run.writer.wait()
    if stopping:
        if ranks.first and trainer.step < run.stop_at:
            run.directory.mark_stopped(trainer.step)
        progress.say(f"stopped as asked after step {trainer.step}, checkpoint written; go on with --resume auto")
    if log:
        log.close()


def _evaluated(run: Run, space: ActionSpace, record: dict[str, Any] | None, log: MetricsLog | None) -> dict[str, Any]:
    """The step's record with what is measured now; a checkpoint is written where that fails, and the run ends."""
    step = run.trainer.step
    try:
        found = evaluate_during_training(run.zero, run.average, run.config, space, run.ranks)
    except UserError as error:  # on every rank alike, so that all of them write
        if log:
            if record:
                record.pop("own_s_by_rank", None)
                log.write(record)
            log.sync()
        _save(run)
        run.writer.wait()
        name = run.directory.checkpoints / f"step_{step:06d}"
        raise UserError(f"evaluation after step {step}: {error} ({name} is written; --resume auto goes on)") from error
    return (record or {"step": step}) | found


def _open_log(run: Run) -> MetricsLog:
    directory = run.directory
    return MetricsLog(directory.metrics_file, open_sinks(run.config, directory.path, directory.tensorboard))


def _named(slow: dict[str, Any], step: int, ranks: Ranks) -> str:
    return (
        f"step {step}: {ranks.peers[slow['rank']].name} keeps the others waiting: {slow['own_s']:.3g} s a step for its "
        f"own data and forward pass, the others {slow['others_s']:.3g} s"
    )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _save(run: Run) -> None:
    trainer = run.trainer
    meta = {
        "updates": trainer.updates,
        "samples_seen": trainer.step * run.config.train.global_batch,
        "written_by": {"world": run.ranks.world, "stage": run.zero.stage},
        "images": run.trainer.dataset_size,
        "action_names": list(space_of(run.config.actions).names),
    }
    run.live.at(f"checkpoint of step {trainer.step}")
    run.writer.save(trainer.step, fragments(run.zero, run.average, run.ranks), meta)


def _warn_of_collapse(record: dict[str, Any], config: Config, progress: TrainingProgress) -> None:
    floor = config.log.rank_me_floor * config.model.encoder_shape.width
    if record.get("rank_me", floor) < floor:
        progress.say(
            f"step {record['step']}: the target may be collapsing: RankMe {record['rank_me']:.1f} of "
            f"{config.model.encoder_shape.width}, spread {record['target_spread']:.2e}"
        )
