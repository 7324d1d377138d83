"""One launch of a training: from a configuration and a folder to a run with its checkpoints."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

from iwm_fast.actions.external import space_of
from iwm_fast.config import Config
from iwm_fast.config.batch import in_steps, said_in_steps, training_steps
from iwm_fast.config.conflicts import conflicts, require_a_step
from iwm_fast.config.hosts import require_within_hosts
from iwm_fast.data.image_list import ImageSet, list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.shard_order import require_streams
from iwm_fast.data.sources import Patience
from iwm_fast.data.split_layout import tell_of_shard_splits, tell_of_splits
from iwm_fast.data.triplet_stream import PairStream
from iwm_fast.data.triplets import Triplets, resolve_triplets
from iwm_fast.engine.build import require_machine, trained_model
from iwm_fast.engine.checkpoint.format import Checkpoint, FileFault
from iwm_fast.engine.checkpoint.fragments import require_fit, restore_shards
from iwm_fast.engine.checkpoint.frozen_file import FrozenFile, adopt_frozen, write_frozen
from iwm_fast.engine.checkpoint.shared_check import choose_together
from iwm_fast.engine.checkpoint.writer import CheckpointWriter, adopt_checkpoint, clear_leftovers, point_latest
from iwm_fast.engine.determinism import deterministic_operators
from iwm_fast.engine.distributed.links import Interconnect, far_below, measure_interconnect
from iwm_fast.engine.distributed.rank_info import require_shared
from iwm_fast.engine.distributed.ranks import Ranks, decide, gather, start
from iwm_fast.engine.distributed.signals import StopRequest
from iwm_fast.engine.distributed.watchdog import Liveness
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.ending import Ending, resume_command
from iwm_fast.engine.evaluator import Evaluator
from iwm_fast.engine.garbage import Upkeep
from iwm_fast.engine.initial import InitialWeights, Started, adopt_record, write_record
from iwm_fast.engine.kernel_choices import KernelChoices, read_tables
from iwm_fast.engine.loop import Run, train
from iwm_fast.engine.metrics.progress import TrainingProgress
from iwm_fast.engine.nonfinite import SkippedSteps
from iwm_fast.engine.provenance import describe_run
from iwm_fast.engine.readiness import require_ready, require_room
from iwm_fast.engine.resuming import (
    ListIdentity,
    choose_checkpoint,
    counted_images,
    order_change,
    order_of,
    require_alike_lists,
    require_data,
)
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.engine.schedules import Schedules
from iwm_fast.engine.step import Trainer
from iwm_fast.engine.zero import initialize
from iwm_fast.environment import usable_cores
from iwm_fast.errors import Interrupted, UserError
from iwm_fast.kernels import use_tuner
from iwm_fast.models.attention import describe_attention
from iwm_fast.models.iwm import IWM

__all__ = ["pretrain"]


def pretrain(
    config: Config, out: Path, resume: str = "never", *, evaluator: Evaluator | None = None, alone: bool = False
) -> Ending:
    """Train into folder ``out``, alone or as one rank of many.

    ``resume``: ``never`` (an error where ``out`` has checkpoints), ``auto`` (from the newest intact one, else from step
    0), or the path of a run or a checkpoint (`checkpoint.paths`). ``evaluator``: measures every ``eval.every_steps``
    steps, usually `iwm_fast.eval.online.OnlineEvaluator`. ``alone``: as the only rank, whatever launcher the
    environment names. Returns how it ended. Raises UserError for what the user can fix, and Interrupted after a Ctrl-C
    that left a checkpoint.
    """
    asked = config.eval.interval_key
    if asked is not None and evaluator is None:
        raise ValueError(f"eval.{asked} is {getattr(config.eval, asked)} and evaluator is None: give one, or unset it")
    with StopRequest() as stop:
        ranks = start(config.train.rank_timeout_s, alone=alone)
        if "OMP_NUM_THREADS" not in os.environ and ranks.device.type == "cpu":
            torch.set_num_threads(max(1, usable_cores() // ranks.local_world))
        if config.data.root is None:
            raise UserError("data.root is not set: name the folder of images, for example data.root=photos/train")
        require_machine(config, ranks.device)  # before anything is written
        require_within_hosts(config.zero.hpz_partition_size, [info.host for info in ranks.infos])
        directory = RunDirectory(out)
        live = Liveness(ranks, config.train.rank_timeout_s)
        with deterministic_operators(config, ranks.device), contextlib.ExitStack() as held, live.watching():
            measured = measure_interconnect(ranks, live, config.train.rank_timeout_s)
            slow = far_below(measured.links, ranks.infos) if measured else None
            if slow and ranks.first:
                print(slow, file=sys.stderr, flush=True)
            live.at("reading of the configuration's data")
            config, triplets = resolve_triplets(config)

            initial = InitialWeights(config.model)

            def choose(fault: FileFault) -> Path | None:
                held.enter_context(directory.locked())
                require_ready(config, directory, evaluator)
                chosen = choose_checkpoint(config, directory, resume, fault)
                if chosen is None:
                    initial.open()
                return chosen

            chosen, doubted = choose_together(ranks, choose)
            require_shared(directory.path, ranks.infos, ranks.rank, lambda value: gather(value, ranks.world))
            if doubted is not None:
                raise UserError(doubted)
            live.at("listing of the data")
            files = triplets or list_images(config.data.root or "", config.data.source, Patience.of(config.data))
            require_alike_lists(files, ranks)
            require_a_step(config, len(files))
            require_streams(config, files, ranks.world)
            if triplets is None:
                what = "all of them are trained on"
                tell_of_splits(config.data.root or "", what)
                if isinstance(files, ImageSet) and (shards := files.source.shards()) is not None:
                    tell_of_shard_splits(config.data.root or "", shards, what)
            identity = ListIdentity(files) if ranks.first else None
            decide(ranks, lambda: _begin(config, directory, chosen, files, identity, ranks, measured))
            step, stop_at = _train(config, directory, chosen, ranks, live, files, identity, stop, evaluator, initial)
    if stop.interrupted:
        raise Interrupted
    return Ending(config, out, step, stop_at, ranks.first)


def _begin(
    config: Config,
    directory: RunDirectory,
    chosen: Path | None,
    files: ImageSet | Triplets,
    identity: ListIdentity | None,
    ranks: Ranks,
    measured: Interconnect | None,
) -> None:
    """Check once more whether the run may resume, then write the files that describe it; on the first rank."""
    step = 0
    if chosen is not None and identity is not None:
        moved = require_data(config, directory, chosen, files, identity)
        if moved:
            print(moved, file=sys.stderr, flush=True)
        step = Checkpoint(chosen).step
        if chosen.resolve().parent == directory.checkpoints.resolve():
            point_latest(
                directory.checkpoints, chosen.resolve().name
            )  # if killed before its next checkpoint, auto resumes from this one
    clear_leftovers(directory.checkpoints)
    directory.drop_metrics_after(step)
    directory.begin(config, describe_run(directory.environment_file, config, ranks, step, measured, len(files)))


def _train(
    config: Config,
    directory: RunDirectory,
    chosen: Path | None,
    ranks: Ranks,
    live: Liveness,
    files: ImageSet | Triplets,
    identity: ListIdentity | None,
    stop: StopRequest,
    evaluator: Evaluator | None,
    initial: InitialWeights,
) -> tuple[int, int]:
    """The step after which it ended, and the one it was to end after."""
    live.at("making of the model")
    saved = Checkpoint(chosen) if chosen is not None else None
    counted = counted_images(saved, len(files))
    given, config = config, in_steps(config, counted)
    space = space_of(config.actions)
    model = trained_model(config, space.dim, ranks.device)
    decide(ranks, lambda: require_room(model, directory.checkpoints))
    done, updates = (saved.step, saved.updates) if saved else (0, 0)
    schedules = Schedules(config.train, training_steps(config, counted))
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
        order=order_of(saved),
    )
    keep = config.checkpoint
    writer = CheckpointWriter(directory.checkpoints, ranks, keep.keep_last, keep.keep_every)
    skipped = SkippedSteps(config.train.max_skipped, directory.skipped_file, ranks)
    with contextlib.closing(stream), contextlib.closing(writer):
        predicts = model.predicts
        live.at("making of the engine")
        frozen, started = _weights(model, saved, directory, ranks, live, initial)
        zero = initialize(model, config, stream.micro_batch, stream.accumulation)
        average = TargetAverage(zero, ranks, started.target) if config.model.target == "ema" else None
        if saved:
            live.at("reading of the checkpoint")
            restore_shards(zero, average, saved)
        trainer = Trainer(
            config, zero, average, stream, schedules, ranks, live=live, skipped=skipped,
            predicts=predicts, action_dim=space.dim, dataset_size=len(files), step=done, updates=updates,
        )  # fmt: skip
        file = directory.kernel_choices_file
        choices = KernelChoices(ranks, file, decide(ranks, lambda: read_tables(file, chosen)))
        run = Run(
            config, directory, ranks, zero, average, trainer, writer, live, stop_at, counted, identity, choices,
            evaluator, frozen,
        )  # fmt: skip
        with TrainingProgress(stop_at, done, shown=ranks.first) as progress:
            _announce(run, given, files, saved, progress)
            for line in started.lines:
                progress.say(line)
            # Before this there is no state to save, and a signal just ends the process.
            held = stop.held(progress.say, resume_command(directory.path, ranks.world))
            with held, Upkeep() as upkeep, live.watching(), use_tuner(choices.choices):
                train(run, space, progress, stop, upkeep)
        return trainer.step, stop_at


def _weights(
    model: IWM,
    saved: Checkpoint | None,
    directory: RunDirectory,
    ranks: Ranks,
    live: Liveness,
    initial: InitialWeights,
) -> tuple[FrozenFile | None, Started]:
    """Fill a new run's model with the weights that it starts from, or a resumed one's with what is frozen
    (`restore_shards` reads the rest); return the frozen ones' file, and what a new run started from.
    """
    file = directory.initial_weights_file
    if saved is None:
        live.at("reading of the weights to start from")
        started = initial.fill(model, ranks)
        decide(ranks, lambda: write_record(file, started))
        constants = model.constants
        written = decide(ranks, lambda: write_frozen(directory.checkpoints, constants)) if constants else None
        return written, started
    require_fit(model, saved)
    decide(ranks, lambda: adopt_record(saved.path, file))
    kept = None
    if (frozen := saved.frozen) is not None:
        kept = decide(ranks, lambda: adopt_frozen(saved.path, directory.checkpoints, frozen.sums))
    decide(ranks, lambda: adopt_checkpoint(saved.path, directory.checkpoints))
    return kept, Started()


def _announce(
    run: Run, given: Config, files: ImageSet | Triplets, saved: Checkpoint | None, progress: TrainingProgress
) -> None:
    """``given``: the configuration before epochs became steps; notes name its keys."""
    config = run.config
    attention = describe_attention(config.model.attention, run.ranks.device)
    frozen = {"target": config.model.target == "frozen", "encoder": config.model.freeze_encoder}
    parts = " and ".join(part for part, held in frozen.items() if held)
    in_fp8 = ", target in fp8" if config.model.target_precision == "fp8" else ""
    progress.say(
        f"{len(files)} {files.describe()}, {run.ranks.world} rank(s) on {run.ranks.device.type}, "
        f"ZeRO stage {config.zero.stage}, {config.train.precision}{in_fp8}, "
        f"{f'frozen {parts}, ' if parts else ''}attention {attention}, "
        f"{'deterministic, ' if config.train.deterministic else ''}"
        f"{'compiled, ' if config.train.compile else ''}{'CUDA graphs, ' if config.train.cuda_graph else ''}"
        f"global batch {config.train.global_batch} = "
        f"{run.ranks.world} × {run.trainer.stream.accumulation} × {run.trainer.stream.micro_batch}"
    )
    stream = run.trainer.stream
    if stream.streams:
        data, shards = config.data, stream.streams["shards"]
        progress.say(
            f"data.order shard: {shards:,} shards in {data.streams:,} streams, {data.streams // run.ranks.world:,} per "
            f"rank, shuffled in windows of up to {data.shuffle_window:,} samples"
        )
    for line in said_in_steps(given, run.counted):
        progress.say(line)
    for line in conflicts(given, run.counted):
        progress.say(f"note: {line}")
    steps, other = (training_steps(given, images) for images in (run.counted, len(files)))
    if steps != other:
        progress.say(
            f"the schedules keep their {steps:,} steps, train.epochs {given.train.epochs:g} of the {run.counted:,} "
            f"images that the run began with; {len(files):,} would be {other:,}"
        )
    change = run.identity.change_since(saved) if saved and run.identity else None
    other_order = order_change(saved, stream.order, stream.streams) if saved else None
    if saved and saved.index.get("images", len(files)) != len(files):
        progress.say(
            f"the data have {len(files)} images now and had {saved.index['images']} when the checkpoint was written: "
            "the remaining samples come in another order, so in this epoch some come twice and some not "
            f"(iwm-fast data index fixes the list{f'; {change}' if change else ''})"
        )
    elif other_order:
        progress.say(
            f"{other_order}: the remaining samples come in another order than when the checkpoint was written, so in "
            f"this epoch some come twice and some not{f' ({change})' if change else ''}"
        )
    elif change:
        progress.say(f"the data changed since the checkpoint was written: {change}")
    if saved:
        progress.say(f"resumed from {saved.path}: the next step is {run.trainer.step + 1} of {run.stop_at}")
    if news := run.choices.news(run.trainer.step):
        progress.say(news)
    if run.trainer.step >= run.stop_at:
        progress.say(f"nothing to do: {run.trainer.step} steps are done; raise train.steps to train further")
