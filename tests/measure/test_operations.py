"""FLOPs counted at dispatch: against torch's counter, and by hand for attention and our operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iwm_fast import kernels
from iwm_fast.measure.flop_count import counted_flops
from iwm_fast.measure.operations import OperationCounter


def test_attention_on_the_cpu_by_hand():
    """Two matmuls of 2 · B · H · n² · d forward, four backward; torch counts none in the fused operator."""
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    one = 2 * 2 * 3 * 5 * 5 * 8
    with OperationCounter() as counter:
        out = F.scaled_dot_product_attention(q, k, v)
        forward = sum(work.operations for work in counter.by_operator.values())
        out.sum().backward()
    assert forward == 2 * one
    assert sum(work.operations for work in counter.by_operator.values()) == 6 * one
    assert counted_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == 6 * one


@pytest.mark.parametrize("action", [False, True])
def test_our_operators_by_their_formulas(action):
    """The registered formulas read shapes only, so the operators are counted on the meta device, where none runs."""
    n, d, h, images, a = 11, 8, 20, 2, 3
    shapes = {"x": (n, d), "w_in": (h, d), "b_in": (h,), "w_out": (d, h), "b_out": (d,)}
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    extra = [torch.empty(images, a, device="meta"), torch.empty(h, a, device="meta")] if action else [None, None]
    cu = torch.empty(images + 1, dtype=torch.int32, device="meta") if action else None
    with OperationCounter() as counter:
        torch.ops.iwm_fast.conditioned_mlp(*given.values(), *extra, cu, None, None, False, 1e-6, "gelu", 2**30)
        torch.ops.iwm_fast.stopgrad_l2(given["x"], given["x"], None, True, 1.0, 1e-6, True)
    by_hand = 2 * n * h * d + 2 * n * h * d + (2 * images * h * a if action else 0)
    assert counter.by_operator["iwm_fast::conditioned_mlp"].operations == by_hand
    assert counter.by_operator["iwm_fast::stopgrad_l2"].operations == n * d * 9
    assert counter.by_operator["iwm_fast::stopgrad_l2"].calls == 1
    assert kernels.conditioned_mlp_flops(n, d, h, d) == 4 * n * h * d


def test_bytes_and_modules():
    """A linear layer in fp32: weight, bias and input read, output written; views are free."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    x = torch.randn(3, 4)
    with torch.no_grad(), OperationCounter() as counter:
        model(x)
    work = counter.by_operator["aten::addmm"]
    assert (work.calls, work.operations, work.bytes) == (1, 2 * 3 * 4 * 6, 4 * (6 + 3 * 4 + 4 * 6 + 3 * 6))
    assert counter.by_module["Sequential.0"].operations == work.operations
    assert counter.by_module["Sequential.1"].operations == 0
    assert counter.modules_of("1")["0"].operations == work.operations


def test_memory_that_is_not_moved_is_not_counted():
    """Allocations, fills, and table rows that are not read."""
    table, rows = torch.zeros(100, 4), torch.tensor([3, 3, 7])
    with OperationCounter() as counter:
        torch.empty(50)
        table.new_zeros(6)
        table.index_select(0, rows)
        table[rows]
    moved = {name: work.bytes for name, work in counter.by_operator.items()}
    read = 2 * 3 * 4 * 4 + 3 * 8
    assert moved == {"aten::empty": 0, "aten::new_zeros": 24, "aten::index_select": read, "aten::index": read}
    assert counter.by_operator["aten::index"].sizes == {(0, read): 1}


def test_a_whole_pass_is_counted_as_torch_counts_it():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 7, 16)
    with OperationCounter() as counter:
        model(x).sum().backward()
    whole = sum(work.operations for work in counter.by_operator.values())
    assert whole == counted_flops(lambda: model(x).sum().backward())
