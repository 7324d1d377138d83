"""Run under torchrun by the tests: several trainings in sequence on the same ranks, which saves the imports.

Arguments: images, out, then one JSON object of changes to the small configuration, with its run's name, for each
training.

With ``record`` a rank also writes what it held and sent to OUT/NAME.RANK.json: the bytes of fp32 in memory just before
the first checkpoint is copied, and for each step the epochs and ids of its samples and its all-gathers of bytes, which
carry the target's copy.

With ``variance`` the training has a second term, a statistic of all ranks' tokens.

With ``fastest`` (by rank, the number of the fastest candidate) block sizes are timed as on a GPU, though Triton
interprets the kernels, and a rank writes those that it used to OUT/NAME.choices.RANK.json.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from second_term import WITH_VARIANCE
from small_run import small_config

from iwm_fast.engine import ema, pretrain
from iwm_fast.engine import step as loop
from iwm_fast.engine.checkpoint import writer as checkpoint_writer
from iwm_fast.engine.distributed.ranks import leave
from iwm_fast.eval.online import OnlineEvaluator
from iwm_fast.kernels import use_backend
from iwm_fast.kernels._choices import run_choices as _run_choices
from iwm_fast.kernels._tuning.tuner import Tuner, key_of
from iwm_fast.models import objective

TERMS = objective.TERMS


def fp32_storages():
    """Return distinct fp32 memory that any tensor of this process reaches, by address."""
    gc.unfreeze()  # a training freezes what existed when it began, and no list of gc's has that
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.dtype == torch.float32:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage
    return storages


class Record:
    """Watches one training from outside."""

    def __init__(self):
        self.held, self.steps = None, []
        self._before = fp32_storages()  # of earlier trainings; referenced, so that no address is reused
        self._plain = (checkpoint_writer.CheckpointWriter.save, loop.Trainer.train_step, dist.all_gather_into_tensor)
        self._samples, self._gathers = [], []

    def __enter__(self):
        save, train_step, gather = self._plain
        forward = loop.Trainer._forward
        self._forward = forward

        def saving(writer, *args):
            if self.held is None:
                now = fp32_storages()
                self.held = sum(s.nbytes() for at, s in now.items() if at not in self._before)
            return save(writer, *args)

        def seeing(trainer, batch):
            self._samples += zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)
            return forward(trainer, batch)

        def stepping(trainer):
            record = train_step(trainer)
            waited_for = trainer.average is None or trainer.average._gathering is None
            self.steps.append({"samples": self._samples, "gathers": self._gathers, "under_way": not waited_for})
            self._samples, self._gathers = [], []
            return record

        def gathering(*args, **kwargs):
            sent = args[1] if len(args) > 1 else kwargs["input_tensor"]
            if sent.dtype == torch.uint8:
                self._gathers.append(sent.numel())
            return gather(*args, **kwargs)

        checkpoint_writer.CheckpointWriter.save, loop.Trainer.train_step = saving, stepping
        loop.Trainer._forward, ema.dist.all_gather_into_tensor = seeing, gathering
        return self

    def __exit__(self, *_):
        save, train_step, gather = self._plain
        checkpoint_writer.CheckpointWriter.save, loop.Trainer.train_step = save, train_step
        loop.Trainer._forward, ema.dist.all_gather_into_tensor = self._forward, gather


class MadeClock:
    """A device on which the candidate of a given number is the fastest, whatever is timed."""

    def __init__(self, fastest, folder):
        self._tuner = Tuner("A_GPU", "sm_90", 10**9, folder, lambda _: self._seconds.pop(0))
        measure = self._tuner._measure

        def measuring(key, left, call):
            self._seconds = [float(i != fastest % len(left)) for i in range(len(left))]
            return measure(key, left, call)

        self._tuner._measure = measuring

    def __enter__(self):
        self.found = {}
        self._plain = _run_choices.device_tuner, _run_choices.RunChoices.run
        _run_choices.device_tuner = lambda _: self._tuner
        run = _run_choices.RunChoices.run

        def running(choices, product, dtype, sizes, call, about):
            def noting(choice):
                key = key_of(product, dtype, sizes, about)
                self.found.setdefault(f"{choices._step} {key}", str(choice))
                assert self.found[f"{choices._step} {key}"] == str(choice)
                return call(choice)

            return run(choices, product, dtype, sizes, noting, about)

        _run_choices.RunChoices.run = running
        return self

    def __exit__(self, *_):
        _run_choices.device_tuner, _run_choices.RunChoices.run = self._plain


images, out, *jobs = sys.argv[1:]
for job in jobs:
    changes = json.loads(job)
    name, resume, record = changes.pop("name"), changes.pop("resume", "never"), changes.pop("record", False)
    fastest = changes.pop("fastest", None)
    objective.TERMS = WITH_VARIANCE if changes.pop("variance", False) else TERMS
    config = small_config(Path(images), **changes)
    if fastest is not None:
        rank = int(os.environ["RANK"])
        with (
            tempfile.TemporaryDirectory() as machine,
            use_backend("triton"),
            MadeClock(fastest[rank], Path(machine)) as clock,
        ):
            pretrain(config, Path(out) / name, resume, evaluator=OnlineEvaluator())
        (Path(out) / f"{name}.choices.{rank}.json").write_text(json.dumps(clock.found))
        continue
    if not record:
        pretrain(config, Path(out) / name, resume, evaluator=OnlineEvaluator())
        continue
    with Record() as seen:
        pretrain(config, Path(out) / name, resume, evaluator=OnlineEvaluator())
    body = {"fp32_bytes": seen.held, "steps": seen.steps}
    (Path(out) / f"{record}.{dist.get_rank()}.json").write_text(json.dumps(body))
leave()
