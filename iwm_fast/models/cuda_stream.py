"""A CUDA stream beside the current one, for work that needs nothing of what the current one does meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["SideStream"]


class SideStream:
    """`follow`, then work on both streams, then `give` what was made: none of it makes the host wait.

    Without a device there is no second stream, and the work is done in the order in which it is written.

    What the work reads has to be held until `give`: its memory comes from the current stream, which uses it again only
    after what it is given later, and so after the work.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is not None and device.type != "cuda":
            raise ValueError(f"device is {device}; only CUDA has streams")
        self._stream = None if device is None else torch.cuda.Stream(device)

    def follow(self) -> None:
        """Let the work begin after all that the current stream has been given until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The work inside goes to the side stream, also that of hooks which it calls."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def give(self, made: Tensor) -> None:
        """Let the current stream wait for the work, and keep its result's memory until that stream has read it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            made.record_stream(current)
