"""Run under torchrun by test_overlap.py: train a small model with small gradient buckets, several times.

Arguments: out, then one JSON object of changes to the small configuration, with its run's name, for each training. A
rank writes OUT/NAME.RANK.pt: its weights, and for each step its gradient norm and the order of "sent" (a bucket) and
"first layer" (the backward pass reaches it).

With ``graphs`` forward and backward are replayed, by a stand-in for CUDA's graphs; with ``late`` bf16 gradients come by
one conversion at the end.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from small_run import small_config

from iwm_fast.actions.external import space_of
from iwm_fast.engine import build, zero
from iwm_fast.engine.bf16 import Bf16Compute
from iwm_fast.engine.distributed.ranks import leave, start
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import BatchStream, synthetic_stream
from iwm_fast.models import attention

WORLD = 2
BUCKET = 6_000  # elements: a twelfth of the model
STEPS = 9


def stream_of(config, space, rank):
    """Return a rank's batches; without a rank those of all, as one process's micro-batches."""
    parts = [
        synthetic_stream(config, space, torch.device("cpu"), rank=r, world=WORLD, steps=3)
        for r in (range(WORLD) if rank is None else [rank])
    ]
    batches = [batch for together in zip(*(part._batches for part in parts), strict=True) for batch in together]
    return BatchStream(batches, parts[0].accumulation * len(parts))


def train(ranks, **changes):
    """Return weights by name after some steps; and each step's events and gradient norm."""
    config = small_config("unread", **changes)
    space = space_of(config.actions)
    stream = stream_of(config, space, ranks.rank if ranks.world > 1 else None)
    trainer = prepare_trainer(config, space, stream, ranks)
    events, seen, norms = [], [], []
    all_reduce = dist.all_reduce

    def sending(tensor, *args, **options):
        if tensor.numel() > 100:
            events.append("sent")
        return all_reduce(tensor, *args, **options)

    def reached(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _grad: events.append("first layer"))

    trainer.zero.module.encoder.patch_embed.register_forward_hook(reached)
    dist.all_reduce = sending
    try:
        for _ in range(STEPS):
            events.clear()
            norms.append(trainer.train_step()["grad_norm"])
            seen.append(list(events))
    finally:
        dist.all_reduce = all_reduce
    weights = {name: p.detach().float() for name, p in trainer.zero.module.named_parameters()}
    return {"weights": weights, "events": seen, "norms": norms}


def prepare(*, graphs, late):
    """Set small buckets, and what a GPU would do."""
    plain = zero.deepspeed_config

    def with_small_buckets(*args):
        settings = plain(*args)
        settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
        return settings

    zero.deepspeed_config, zero.BUCKET_BYTES = with_small_buckets, 4 * BUCKET
    hand_over = Bf16Compute.hand_over
    if late:
        Bf16Compute.hand_over = lambda *_: None
    library = None
    if graphs:
        sys.path.insert(0, str(Path(__file__).parent / "engine"))
        from test_graphs import Again, by_bounds

        packed, attention.packed_qkv_attention = attention.packed_qkv_attention, by_bounds
        asked, build.require_graphs = build.require_graphs, lambda *_: None
        recorder, zero.CudaRecorder = zero.CudaRecorder, Again
        library = attention.use_library(lambda *qkv: qkv[0])
        library.__enter__()

    def undo():
        zero.deepspeed_config, Bf16Compute.hand_over = plain, hand_over
        if library is not None:
            library.__exit__(None, None, None)
            attention.packed_qkv_attention, build.require_graphs, zero.CudaRecorder = packed, asked, recorder

    return undo


if __name__ == "__main__":
    out, *jobs = sys.argv[1:]
    ranks = start(60.0)
    for job in map(json.loads, jobs):
        name, graphs, late = job.pop("name"), job.pop("graphs", False), job.pop("late", False)
        if graphs:
            job |= {"train__static_shapes": True, "train__cuda_graph": True}
        undo = prepare(graphs=graphs, late=late)
        found = train(ranks, **job)
        undo()
        torch.save(found, Path(out) / f"{name}.{ranks.rank}.pt")
    leave()
