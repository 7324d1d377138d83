"""The gradient of the mask token over many patches: an ordered sum in fp32 or better, whatever the tokens' dtype."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iwm_fast.kernels.predictor_input import mask_tokens


class Operators(TorchDispatchMode):
    """Records the names of all operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def gradient(dtype, rows=4001):
    """Return the token's gradient, for one image's nine patches predicted repeatedly; and the upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    position, incoming = torch.randn(9, 24, generator=generator), torch.randn(rows, 24, generator=generator) + 0.5
    position, incoming = position.to(dtype), incoming.to(dtype)
    token = torch.ones(24, dtype=dtype, requires_grad=True)
    patches = torch.randint(0, 9, (rows,), generator=generator)
    with Operators() as operators:
        out = mask_tokens(token, position, patches)
        (found,) = torch.autograd.grad(out, token, incoming)
    assert torch.equal(out.detach(), (position + 1).index_select(0, patches))
    return found, incoming, operators.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_is_summed_before_it_is_rounded_and_has_equal_bits(dtype):
    found, incoming, _ = gradient(dtype)
    expected = incoming.double().sum(0)
    # Half a unit in the last place, and the rounding of a sum of 4,001 fp32 values.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=0)
    assert torch.equal(gradient(dtype)[0], found)


def test_no_row_is_added_by_its_number():
    """Operators that add rows by index use atomics on a GPU, in any order."""
    names = gradient(torch.bfloat16)[2]
    assert "sum" in names
    assert not {name for name in names if "add_" in name or "index_add" in name or "index_put" in name}
