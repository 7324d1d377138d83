"""A CUDA stream beside the current one, for independent work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["SideStream"]


class SideStream:
    """`follow`, work on both streams, then `give` the result; the host never waits.

    Without a device there is no second stream, and work runs in program order.

    Hold the inputs of the work until `give`: their memory belongs to the current stream, which reuses it only for work
    submitted later, which then waits for `give`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        if device is not None and device.type != "cuda":
            raise ValueError(f"device is {device}; only CUDA has streams")
        self._stream = None if device is None else torch.cuda.Stream(device)

    def follow(self) -> None:
        """Make the side stream wait for everything submitted to the current stream so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Submit the work inside to the side stream, including that of hooks."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def give(self, made: Tensor) -> None:
        """Make the current stream wait for the work, and keep the result's memory until it has been read."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            made.record_stream(current)
