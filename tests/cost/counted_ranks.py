"""Run under torchrun by test_counted.py: train each configuration and record a warmed-up step's bytes sent and held.

Arguments: images, out, then one JSON object of changes to the small configuration for each training. Rank 0 writes
OUT/counted.json. ``settings``: of DeepSpeed's zero_optimization, beside the packaged ones.
"""

import json
import sys
from pathlib import Path

import torch
from small_run import small_config
from torch.utils._pytree import tree_leaves

from iwm_fast.engine import pretrain, zero
from iwm_fast.engine import step as loop
from iwm_fast.engine.distributed.ranks import leave
from iwm_fast.measure.collective_bytes import CollectiveCounter

SETTLED = 3  # DeepSpeed's stage 3 records the order of the modules in its first step, and gathers by it from the next


def held(*values) -> int:
    """Return the bytes of all storages behind the tensors in `values`, each once."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory(trainer) -> dict[str, int]:
    zero, optimizer = trainer.zero, trainer.zero.engine.optimizer
    parameters = list(zero.module.parameters())
    stored = [getattr(p, "ds_tensor", p) for p in parameters]
    average = trainer.average
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) if zero.stage == 3 else None
    if zero.stage in (1, 2):
        masters = optimizer.single_partition_of_fp32_groups
    moments = [[state[key] for key in ("exp_avg", "exp_avg_sq")] for state in zero.optimizer.state.values()]
    online = [t for t, p in zip(stored, parameters, strict=True) if p.requires_grad]
    return {
        "online": held(online),
        "constant": held([t for t, p in zip(stored, parameters, strict=True) if not p.requires_grad]),
        "optimizer": held(masters, moments),
        "ema": held(
            getattr(average, "averages", None), *(getattr(average, key, None) for key in ("_everyone", "_sent"))
        ),
    }


def gradients(trainer) -> int:
    optimizer = trainer.zero.engine.optimizer
    named = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
    kept = [p.grad for p in trainer.zero.module.parameters()]
    return held(kept, [getattr(optimizer, name, None) for name in named])


class Watched(loop.Trainer):
    """Records the collectives of every step and, after every backward pass, the gradients, by step."""

    notes: list

    def train_step(self):
        backward, self.after_backward, copies = self.zero.engine.backward, [], []

        def then_look(*args, **options):
            backward(*args, **options)
            self.after_backward.append(gradients(self))
            copies.append(held([getattr(p, "ds_secondary_tensor", None) for p in self.zero.module.parameters()]))

        self.zero.engine.backward = then_look
        with CollectiveCounter() as counter:
            record = super().train_step()
        self.zero.engine.backward = backward
        if self.step == SETTLED:
            calls = [[call.kind, call.size, call.ranks] for call in counter.calls]
            note = {"calls": calls, "gradients": max(self.after_backward), "memory": memory(self), "copy": max(copies)}
            notes = [None] * self.ranks.world
            torch.distributed.all_gather_object(notes, note)
            Watched.notes.append(notes)
        return record


if __name__ == "__main__":
    from iwm_fast.engine import train

    train.Trainer = Watched
    # Only sizes count, so frozen parts keep their random weights.
    train.InitialWeights.open = lambda _: None
    train.InitialWeights.fill = lambda *_: train.Started()
    Watched.notes = []
    images, out, *jobs = sys.argv[1:]
    packaged = zero.deepspeed_config
    for i, job in enumerate(jobs):
        changes = json.loads(job)
        settings = changes.pop("settings", {})

        def with_settings(*given, settings=settings):
            found = packaged(*given)
            found["zero_optimization"] |= settings
            return found

        zero.deepspeed_config = with_settings
        pretrain(small_config(Path(images), **changes), Path(out) / str(i))
    if torch.distributed.get_rank() == 0:
        (Path(out) / "counted.json").write_text(json.dumps(Watched.notes))
    leave()
