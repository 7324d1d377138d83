"""Memory limit of the MLP's hidden activations during a call, and the temporary memory of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from iwm_fast.kernels._tuning.candidates import PROCESSORS, candidates_of, slices_of

__all__ = ["chunk_rows", "limited", "mlp_workspace", "use_workspace", "workspace_bytes"]

_workspace = 2**30
_SMALLEST_CHUNK = 64
# Plans assume the weight gradients' slices of an H100 or H200.
_ARCHITECTURE = "sm_90"


def workspace_bytes() -> int:
    """Return the bytes for hidden activations of calls that set no limit themselves (1 GiB unless set)."""
    return _workspace


@contextlib.contextmanager
def use_workspace(size: int) -> Iterator[None]:
    """Set `workspace_bytes` inside, for the process. A call's backward pass has its forward pass's limit."""
    global _workspace  # noqa: PLW0603 - of the process
    before, _workspace = _workspace, limited(size)
    try:
        yield
    finally:
        _workspace = before


def limited(workspace: int | None) -> int:
    """Return a call's limit in bytes; None: `workspace_bytes`. Raise ValueError below 1."""
    size = workspace_bytes() if workspace is None else workspace
    if size < 1:
        raise ValueError(f"workspace is {size} bytes; it must be at least 1")
    return size


def chunk_rows(rows: int, units: int, element: int, copies: int, workspace: int) -> int:
    """Return rows per chunk: all if `copies` tensors (N, H) fit into `workspace` bytes, else a power of two that fits.

    At least 64 rows, or all if there are fewer, even if these need more.
    """
    most = workspace // max(1, units * element * copies)
    if rows <= most:
        return max(1, rows)
    return max(_SMALLEST_CHUNK, 1 << max(0, most.bit_length() - 1))


def mlp_workspace(
    rows: int,
    width: int,
    hidden: int,
    element: int,
    *,
    backward: bool,
    norm: bool = True,
    image: bool = False,
    workspace: int | None = None,
) -> int:
    """Return the peak bytes of one call of the MLP beside its inputs and results.

    Forward: the normalised input and the hidden activations (chunk, H). Backward: these, their gradient, and both
    weight gradients' slices in fp32; with several chunks, both sums and the slices of one. `image`: the image of each
    token, int32, if an action is given. `workspace`: the call's limit for the hidden activations, in bytes; None:
    `use_workspace`'s, or 1 GiB.
    """
    copies = 2 if backward else 1
    chunk = min(rows, chunk_rows(rows, hidden, element, copies, limited(workspace)))
    held = chunk * element * (copies * hidden + (width if norm else 0)) + (4 * rows if image else 0)
    if not backward:
        return held
    best = candidates_of(_ARCHITECTURE, "weight_grad")[0]
    slices = []
    for p, q in ((width, hidden), (hidden, width)):
        blocks = -(-p // best.block_n) * -(-q // best.block_m)
        slices.append(slices_of(blocks, -(-chunk // best.block_k), PROCESSORS[_ARCHITECTURE]))
    return held + 4 * width * hidden * (sum(slices) if chunk == rows else 2 + max(slices))
