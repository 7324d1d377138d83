"""The profiler's events of some steps as tables: time by operator, by GPU kernel, and by module in both passes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["ModuleTime", "Traced", "module_ranges", "trace_steps"]

_MARK = "module "  # what a module's range in the trace begins with
_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass
class ModuleTime:
    """Seconds a step of a module with its parts."""

    calls: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass
class Traced:
    """The traced steps: operators' own time, GPU kernels' time, modules' time, and memory over time.

    operators and kernels: name → (seconds per step, calls per step). counted: seconds per step of the counted operators
    with all that they call, where no other counted one calls them. memory: (seconds from the first, bytes held) at each
    allocation and release, relative to the beginning.
    """

    operators: dict[str, tuple[float, float]]
    kernels: dict[str, tuple[float, float]]
    counted: dict[str, float]
    modules: dict[str, ModuleTime]
    memory: list[tuple[float, int]]
    profiler: Any


@contextlib.contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Name each module's forward pass in traces, and in NVTX where there is a GPU."""
    ranges: list[Any] = []
    hooks = []
    nvtx = torch.cuda.is_available()

    def open_range(name: str) -> None:
        ranges.append(record_function(f"{_MARK}{name}"))
        ranges[-1].__enter__()
        if nvtx:
            torch.cuda.nvtx.range_push(name)

    def close_range() -> None:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: open_range(name)))
            hooks.append(module.register_forward_hook(lambda *_: close_range()))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trace_steps(
    step: Callable[[], object], model: nn.Module, device: torch.device, steps: int, counted: Collection[str] = ()
) -> Traced:
    """Run `step` under the profiler. counted: names of the operators whose work is known."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with module_ranges(model), profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(steps):
            step()
    events = list(profiler.events())
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        on_device = event.device_type != DeviceType.CPU
        if event.name.startswith((_MARK, _BACKWARD, "iwm/", "[memory]", "ProfilerStep")) or event.is_user_annotation:
            continue
        row = (kernels if on_device else operators)[event.name]
        # On a GPU an operator's time is that of the kernels that it started.
        on_gpu = device.type == "cuda"
        row[0] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6 / steps
        row[1] += event.count / steps
    return Traced(
        {name: (row[0], row[1]) for name, row in operators.items()},
        {name: (row[0], row[1]) for name, row in kernels.items()},
        _counted_times(events, device, steps, frozenset(counted)),
        _module_times(events, device, steps),
        _memory(profiler),
        profiler,
    )


def _seconds(event: Any, device: torch.device) -> float:
    return float(event.device_time_total if device.type == "cuda" else event.cpu_time_total) * 1e-6


def _module_times(events: list[Any], device: torch.device, steps: int) -> dict[str, ModuleTime]:
    """Forward from the modules' own ranges; backward from the sequence numbers that tie a node to its operator."""
    found: dict[str, ModuleTime] = defaultdict(ModuleTime)
    made_in: dict[int, list[str]] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if event.name.startswith(_MARK):
            time = found[event.name.removeprefix(_MARK)]
            time.calls += 1 / steps
            time.forward += _seconds(event, device) / steps
        elif event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and event.scope == 0:
            paths = _enclosing(event)
            if paths:
                made_in[event.sequence_nr] = paths
    for event in events:
        if event.device_type == DeviceType.CPU and event.name.startswith(_BACKWARD):
            for path in made_in.get(event.sequence_nr, []):
                found[path].backward += _seconds(event, device) / steps
    return dict(found)


def _counted_times(events: list[Any], device: torch.device, steps: int, counted: frozenset[str]) -> dict[str, float]:
    """Whole times of outermost counted operators: what a dispatch mode counts, which sees none of what they call."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU or event.name not in counted:
            continue
        parent = event.cpu_parent
        while parent is not None and parent.name not in counted:
            parent = parent.cpu_parent
        if parent is None:
            found[event.name] += _seconds(event, device) / steps
    return dict(found)


def _enclosing(event: Any) -> list[str]:
    """The modules whose forward pass an event happened in."""
    paths = []
    while event is not None:
        if event.name.startswith(_MARK):
            paths.append(event.name.removeprefix(_MARK))
        event = event.cpu_parent
    return paths


def _memory(profiler: Any) -> list[tuple[float, int]]:
    found, held, first = [], 0, None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            first = event.start_ns() if first is None else first
            held += event.nbytes()
            found.append(((event.start_ns() - first) * 1e-9, held))
    return found
