"""Count FLOPs with torch's counter, with attention as plain matmuls, which it counts on every device.

torch's counter has no formula for the CPU's fused attention and would count nothing for it. Operators of
`iwm_fast.kernels` register their own formulas.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counted_flops"]


def counted_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the matmuls that `work` runs, forward and backward; a multiply-add is two."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return int(counter.get_total_flops())
