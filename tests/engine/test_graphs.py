"""A captured step on the CPU: a recorder that runs the work again stands in for CUDA's graphs.

Asserted: a replay's losses and weights are those of the step without graphs, at each stage; it reads no length on the
host (attention here uses the bounds on the device only); and nothing it reads moves in memory.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from second_term import WITH_VARIANCE
from small_run import small_config
from torch.utils._pytree import tree_leaves

from iwm_fast.actions.external import space_of
from iwm_fast.engine import build, zero
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.engine.graphs import require_graphs
from iwm_fast.errors import UserError
from iwm_fast.kernels import rope
from iwm_fast.measure.harness import prepare_trainer
from iwm_fast.measure.synthetic import synthetic_stream
from iwm_fast.models import attention, objective


def tensors_of(found):
    return [t for t in tree_leaves(vars(found)) if t is not None]


class Again:
    """Runs the work at each replay and writes to its first results; until then they are NaN, as on a GPU."""

    def record(self, work):
        first = work()
        tensors = tensors_of(first[0])
        for tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

        def replay():
            for old, new in zip(tensors, tensors_of(work()[0]), strict=True):
                old.copy_(new)

        return first, replay


def by_bounds(qkv, segments, backend, rotation=None):
    """Attention that reads only the segments' device tensors."""
    bounds = segments.cu_seqlens.long()
    image = torch.repeat_interleave(bounds.diff(), output_size=qkv.shape[0])
    parts = qkv.unbind(1) if rotation is None else rope(qkv, rotation.table, rotation.patches)
    q, k, v = (part.transpose(0, 1) for part in parts)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=image[:, None] == image[None, :]).transpose(0, 1)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(attention, "packed_qkv_attention", by_bounds)
    monkeypatch.setattr(build, "require_graphs", lambda *_: None)
    monkeypatch.setattr(zero, "CudaRecorder", Again)
    with attention.use_library(lambda *qkv: qkv[0]):
        yield


def trained_for(steps, *, graphs, **changes):
    config = small_config("unread", train__static_shapes=True, train__cuda_graph=graphs, **changes)
    space, ranks = space_of(config.actions), start(alone=True)
    trainer = prepare_trainer(config, space, synthetic_stream(config, space, ranks.device, steps=3), ranks)
    losses, places = [], []
    for _ in range(steps):
        losses.append(trainer.train_step()["loss"])
        module = trainer.zero.engine.module
        captured = list(module._graphs.values()) if graphs else []
        held = [*trainer.zero.module.parameters(), *(t for g in captured for t in (*g.inputs, *g.gradients))]
        places.append([t.data_ptr() for t in held])
    return trainer, losses, places


FROZEN = {"model__freeze_encoder": True, "model__init": "w", "model__target": "shared", "train__precision": "bf16"}
VARIANTS = {
    "stage 0, micro-batches": {"train__micro_batch": 4, "model__predictor__conditioning": "sequence+block"},
    "stage 1, sources": {"zero__stage": 1, "views__sources_per_target": 2},
    "stage 2": {"zero__stage": 2, "train__micro_batch": 4},
    "mlp": {"model__predictor": {"kind": "mlp", "depth": 1, "width": 32, "conditioning": "block"}},
    "bf16": {"zero__stage": 0, "train__precision": "bf16"},
    "prefix tokens and rope": {"model__prefix_tokens": 3, "model__positions": "rope", "zero__stage": 1},
    "learned positions": {"model__prefix_tokens": 1, "model__positions": "learned", "train__micro_batch": 4},
    "frozen encoder": FROZEN,
    "frozen target": {"model__target": "frozen", "model__target_init": "w", "zero__stage": 1},
}


QUICK = ("stage 1, sources", "bf16")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
def test_replays_train_as_the_step_without_graphs_and_nothing_they_read_moves(without_gpu, changes):
    """The loss's factor is applied elsewhere, so gradients differ in their last bit: bf16's is 2⁻⁸."""
    bf16 = "train__precision" in changes
    eager, expected, _ = trained_for(9, graphs=False, **changes)
    trainer, found, places = trained_for(9, graphs=True, **changes)
    assert found == pytest.approx(expected, rel=1e-2 if bf16 else 2e-5)
    graphed = trainer.zero.graphed
    assert graphed.captures == len(trainer.packer.sizes) == len(graphed._graphs)
    assert places[-1] == places[-2]
    assert graphed._segments  # what a graph reads in place stays, whatever sizes are asked for later
    weights = len(list(trainer.zero.module.parameters()))
    assert places[-1][:weights] == places[0][:weights]
    for mine, other in zip(trainer.zero.module.parameters(), eager.zero.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-2 if bf16 else 2e-4)


def test_replays_train_with_a_second_term_whose_factor_is_another(without_gpu, monkeypatch):
    monkeypatch.setattr(objective, "TERMS", WITH_VARIANCE)
    _, expected, _ = trained_for(9, graphs=False)
    trainer, found, _ = trained_for(9, graphs=True)
    assert found == pytest.approx(expected, rel=2e-5)
    assert trainer.zero.graphed.captures
    assert {"loss_prediction", "loss_variance"} <= trainer.train_step().keys()


def test_replays_train_beside_a_term_of_the_frozen_encoder_which_has_no_gradient(without_gpu, monkeypatch):
    monkeypatch.setattr(objective, "TERMS", WITH_VARIANCE)
    _, expected, _ = trained_for(7, graphs=False, **FROZEN)
    trainer, found, _ = trained_for(7, graphs=True, **FROZEN)
    assert trainer.zero.graphed.captures
    assert found == pytest.approx(expected, rel=1e-2)


def test_without_gradients_or_inside_eager_the_model_computes_as_it_is(without_gpu):
    trainer, _, _ = trained_for(9, graphs=True)
    graphed, replays = trainer.zero.graphed, []
    for captured in graphed._graphs.values():
        object.__setattr__(captured, "replay", lambda: replays.append(1))
    with graphed.eager():
        trainer.train_step()
    assert not replays
    trainer.train_step()
    assert replays


def test_a_step_that_cannot_be_captured_ends_with_one_line(without_gpu, monkeypatch):
    class Refuses:
        def record(self, _):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(zero, "CudaRecorder", Refuses)
    with pytest.raises(UserError, match=r"predicted tokens cannot be captured \(operation not permitted .*\): set it"):
        trained_for(9, graphs=True)


def test_the_machine_is_checked_before_anything_is_built(monkeypatch):
    config = small_config("unread", train__static_shapes=True, train__cuda_graph=True)
    with pytest.raises(UserError, match=r"^train.cuda_graph needs a GPU; this rank computes on cpu: set it to false$"):
        require_graphs(config, torch.device("cpu"))
    monkeypatch.setattr("iwm_fast.engine.graphs.resolve_backend", lambda *_: "sdpa")
    with pytest.raises(UserError, match=r"^train.cuda_graph needs packed attention, and this machine has sdpa, which"):
        require_graphs(config, torch.device("cuda"))
