"""The training loop: steps, and between them evaluation, checkpoints, logging and signals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from iwm_fast.actions.external import space_of
from iwm_fast.actions.space import ActionSpace
from iwm_fast.config import Config
from iwm_fast.data.bad_samples import FILE_NAME as BAD_SAMPLES_FILE
from iwm_fast.engine.checkpoint.fragments import fragments, tensor_shapes
from iwm_fast.engine.checkpoint.frozen_file import FROZEN_KEY, FrozenFile
from iwm_fast.engine.checkpoint.writer import CheckpointWriter
from iwm_fast.engine.distributed.ranks import Ranks, agree
from iwm_fast.engine.distributed.signals import Abandoned, StopRequest
from iwm_fast.engine.distributed.stragglers import Stragglers
from iwm_fast.engine.distributed.watchdog import Liveness
from iwm_fast.engine.ema import TargetAverage
from iwm_fast.engine.ending import resume_command
from iwm_fast.engine.evaluator import Evaluator, live_model
from iwm_fast.engine.garbage import Upkeep
from iwm_fast.engine.kernel_choices import KernelChoices
from iwm_fast.engine.metrics.clock import seconds_since_start
from iwm_fast.engine.metrics.collapse import CollapseWatch
from iwm_fast.engine.metrics.episodes import FaultWatch
from iwm_fast.engine.metrics.log import MetricsLog
from iwm_fast.engine.metrics.loggers import open_sinks
from iwm_fast.engine.metrics.progress import TrainingProgress
from iwm_fast.engine.resuming import ListIdentity
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.engine.step import Trainer
from iwm_fast.engine.zero import ZeroEngine
from iwm_fast.errors import UserError

__all__ = ["Run", "train"]

# A checkpoint waits this long for the identity of the data, which a thread computes; without it, a run resumes only
# with the same data.root.
_IDENTITY_S = 10.0


@dataclass(frozen=True)
class Asked:
    """The signals of all ranks, combined."""

    stop: bool = False
    interrupted: bool = False


@dataclass
class Run:
    """Everything that a launch has built."""

    config: Config
    directory: RunDirectory
    ranks: Ranks
    zero: ZeroEngine
    average: TargetAverage | None
    trainer: Trainer
    writer: CheckpointWriter
    live: Liveness
    stop_at: int
    counted: int  # images that schedules and intervals in epochs are counted in
    identity: ListIdentity | None  # on the first rank
    choices: KernelChoices
    evaluator: Evaluator | None
    frozen: FrozenFile | None


def train(run: Run, space: ActionSpace, progress: TrainingProgress, stop: StopRequest, upkeep: Upkeep) -> None:
    """Train until the last step or a signal, and save the state."""
    trainer, ranks = run.trainer, run.ranks
    first, saved_at = trainer.step + 1, trainer.step
    log = _open_log(run) if ranks.first else None
    warnings = _Warnings(run, progress)
    asked = Asked()
    if ranks.world == 1:  # with several ranks, the others are in the step already and wait for this one
        trainer.waiting = stop.abandonable
    trainer.restart_clock()
    while trainer.step < run.stop_at and not asked.stop:
        run.choices.choices.begin(trainer.step + 1)
        try:
            record = trainer.train_step()
        except Abandoned:
            asked = Asked(stop=True, interrupted=stop.interrupted)
            break
        run.live.started()
        upkeep.after(trainer.step)
        if record and trainer.step == first:
            record["first_step_after_s"] = seconds_since_start()
        asked = _asked(run, stop)
        if run.evaluator and _due(run.config.eval.every_steps, trainer.step) and not asked.stop:
            record = _evaluated(run, run.evaluator, space, record, log, stop)
            asked = _asked(run, stop)
            trainer.restart_clock()
        if record and log:
            own_s = record.pop("own_s_by_rank", [0.0])
            log.write(record)
            warnings.after(record, own_s)
        progress.step(trainer.step, record if record and "loss" in record else None)
        if asked.stop or trainer.step == run.stop_at or _due(run.config.checkpoint.every_steps, trainer.step):
            _save(run, log)
            saved_at = trainer.step
    if saved_at < trainer.step:
        _save(run, log)
    run.live.at("writing of the last checkpoint")
    run.writer.wait()
    stop.interrupted = asked.interrupted
    if asked.stop:
        _say_stopped(run, asked, progress, made_steps=trainer.step >= first)
    if log:
        log.close()


def _evaluated(
    run: Run,
    evaluator: Evaluator,
    space: ActionSpace,
    record: dict[str, Any] | None,
    log: MetricsLog | None,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """Return the step's record with the evaluation's numbers, or unchanged where the process is to stop. A failed
    evaluation writes a checkpoint and ends the run.
    """
    step = run.trainer.step
    try:
        model = live_model(run.zero, run.average, run.config, space, run.ranks, run.frozen)
        found = evaluator.measure(model, run.config, space, run.ranks, stop.abandonable)
    except UserError as error:  # on every rank, so that all of them write
        if log and record:
            record.pop("own_s_by_rank", None)
            log.write(record)
        _save(run, log)
        run.writer.wait()
        name = run.directory.checkpoints / f"step_{step:06d}"
        raise UserError(
            f"evaluation after step {step}: {error} ({name} is written; resume with --resume auto)"
        ) from error
    return (record or {"step": step}) | found if found else record


def _asked(run: Run, stop: StopRequest) -> Asked:
    """Return the signals of all ranks combined; raises the error of any rank's checkpoint writing.

    All ranks meet here, so missing block sizes are tuned too.
    """
    asked, interrupted, write_failed, lacking = agree(
        run.ranks, stop.asked, stop.interrupted, run.writer.failed, run.choices.choices.lacking
    )
    if write_failed:
        run.writer.wait()
    if lacking:
        run.live.starting()
        run.live.at("timing of the kernels")
        run.choices.meet(run.trainer.step + 1)
        run.trainer.restart_clock()
    return Asked(asked, interrupted)


def _say_stopped(run: Run, asked: Asked, progress: TrainingProgress, *, made_steps: bool) -> None:
    step, out = run.trainer.step, run.directory.path
    if run.ranks.first and step < run.stop_at:
        run.directory.mark_stopped(step)
    word = "interrupted" if asked.interrupted else "stopped as asked"
    if step == 0:
        again = resume_command(out, run.ranks.world)
        progress.say(f"{word} before the first step: there is nothing to save; start again with: {again}")
        return
    held = f"checkpoint {run.directory.checkpoints / f'step_{step:06d}'}" if made_steps else "no step was taken"
    progress.say(f"{word} after step {step}, {held}; resume with: {resume_command(out, run.ranks.world)}")


def _open_log(run: Run) -> MetricsLog:
    directory, first = run.directory, run.trainer.step + 1
    return MetricsLog(directory.metrics_file, open_sinks(run.config, directory.path, directory.tensorboard, first))


class _Warnings:
    """What the log warns of, each fault once per episode."""

    def __init__(self, run: Run, progress: TrainingProgress) -> None:
        self._run, self._say = run, progress.say
        self._stragglers = Stragglers(run.config.log.straggler_ratio)
        self._collapse = CollapseWatch(run.config)
        self._faults = FaultWatch(run.config.train.max_skipped, run.directory.path / BAD_SAMPLES_FILE)
        self._skipped = run.trainer.skipped.count

    def after(self, record: dict[str, Any], own_s: list[float]) -> None:
        """Say what a step's record shows; one with measurements alone shows nothing."""
        if "loss" not in record:
            return
        slow = self._stragglers.look(own_s, record["step_s"])
        if slow:
            self._say(_named(slow, record["step"], self._run.ranks))
        collapsing = self._collapse.look(record)
        if collapsing:
            self._say(collapsing)
        skipped = self._run.trainer.skipped.count
        for line in self._faults.look(record, skipped - self._skipped):
            self._say(line)
        self._skipped = skipped


def _named(slow: dict[str, Any], step: int, ranks: Ranks) -> str:
    return (
        f"step {step}: {ranks.infos[slow['rank']].name} keeps the others waiting: {slow['own_s']:.3g} s per step for "
        f"its own data and forward pass, the others {slow['others_s']:.3g} s"
    )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _save(run: Run, log: MetricsLog | None) -> None:
    trainer = run.trainer
    trainer.settle()
    if log:
        log.sync()
    meta: dict[str, Any] = {
        "updates": trainer.updates,
        "samples_seen": trainer.step * run.config.train.global_batch,
        "written_by": {"world": run.ranks.world, "stage": run.zero.stage},
        "images": run.trainer.dataset_size,
        "counted_images": run.counted,
        "order": trainer.stream.order,
        **({"streams": streams} if (streams := trainer.stream.streams) else {}),
        "action_names": list(space_of(run.config.actions).names),
    }
    if run.frozen:
        meta[FROZEN_KEY] = dict(run.frozen.sums)
    identity = run.identity.soon(_IDENTITY_S) if run.identity else None
    if identity:
        meta["data"] = identity.document()
    run.live.at(f"checkpoint of step {trainer.step}")
    shapes = tensor_shapes(run.zero, run.average)
    run.writer.save(trainer.step, fragments(run.zero, run.average, run.ranks), meta, shapes)
    trainer.restart_clock()
