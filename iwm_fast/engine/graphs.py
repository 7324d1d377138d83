"""A micro-batch's forward and backward pass as one CUDA graph for each pair of token counts (`train.cuda_graph`).

Inside the graph: both encoders, the predictor, the loss, and every gradient by `torch.autograd.grad`, so that no hook
of DeepSpeed's runs there. Outside: packing, the EMA and its arrival, collectives, the optimizer. After a replay the
gradients are handed to the parameters by an autograd function whose backward returns them, so DeepSpeed's hooks see
what they would have seen, but all of it at the end and in another order: communication does not overlap the backward
pass any more, and gradients are sent in the parameters' order (`FusedZero.at_the_end`, `SummedGradients`).

What a graph reads and writes lies where it lay at capture: the weights (DeepSpeed and the optimizer write in place),
and buffers that a batch is copied into. Of a batch only tensors differ: lengths on the host are those of the captured
batch and stand for numbers of tokens alone, because segments have a ceiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from iwm_fast.config import Config
from iwm_fast.errors import UserError
from iwm_fast.kernels import compiled_variants
from iwm_fast.kernels._lib.once import once_differentiable
from iwm_fast.models.attention import GROUPED, resolve_backend
from iwm_fast.models.compiled_regions import compilations
from iwm_fast.models.iwm import IWMOutput, Losses
from iwm_fast.models.packing import Segments, held_segments

__all__ = ["CudaRecorder", "GraphedStep", "Recorder", "require_graphs"]

Made = TypeVar("Made")


def require_graphs(config: Config, device: torch.device) -> None:
    """Raise UserError where train.cuda_graph is set and this machine cannot capture a step."""
    if not config.train.cuda_graph:
        return
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph needs a GPU; this rank computes on {device.type}: set it to false")
    backend = resolve_backend(config.model.attention, device.type)
    if backend in GROUPED:
        raise UserError(
            f"train.cuda_graph needs packed attention, and this machine has {backend}, which launches one kernel per "
            "sequence length: set it to false"
        )


class Recorder(Protocol):
    """Records work once and returns a replay of its launches."""

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """Return (what `work` returned, replay); a replay rewrites those tensors. Nothing has been computed yet."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: one runs at a time, and its results are read or copied before the
    next.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
        """As `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, DALI's among them, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = work()
        return made, graph.replay


class _Handed(torch.autograd.Function):
    """A loss whose gradients exist already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable("a replayed CUDA graph")
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        # New tensors: the next replay overwrites the graph's own.
        scaled = torch._foreach_mul(ctx.gradients, incoming[0])  # noqa: SLF001  (has no public name)
        return (None, None, *scaled)


@dataclass(frozen=True, eq=False)
class _Captured:
    """inputs: buffers that a batch is copied into. gradients: of the parameters that have one, written by a replay."""

    inputs: list[Tensor]
    found: Losses
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    replay: Callable[[], None]


class GraphedStep(nn.Module):
    """`model` whose forward pass in training is a replay of forward and backward.

    A pair of token counts is computed as it is, by the model itself, until that has compiled and tuned nothing, and
    captured when it comes again; rare pairs may never be. Without gradients, or without static shapes, it is the model.
    captures: graphs made so far.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.model = model
        self.captures = 0
        self._recorder = recorder
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._compiled: dict[tuple[int, int], int] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._segments: set[Segments] = set()
        self._off = False

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, the model computes eagerly, so that hooks and profilers see its modules and operators."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def buffers_read(self) -> list[Tensor]:
        """Return the batch buffers and gradients that the graphs read and write."""
        return [tensor for graph in self._graphs.values() for tensor in (*graph.inputs, *graph.gradients)]

    def forward(self, *arguments: Any) -> IWMOutput:
        """As `IWM.forward`."""
        seen, asked = (part for part in arguments if isinstance(part, Segments))
        key = seen.total, asked.total
        if self._off or not torch.is_grad_enabled() or not seen.padding:
            output: IWMOutput = self.model(*arguments)
            return output
        if key not in self._graphs:
            compiled = compiled_variants() + compilations()
            with held_segments(self._segments):
                if self._compiled.get(key) != compiled:
                    self._compiled[key] = compiled
                    eager: IWMOutput = self.model(*arguments)
                    return eager
                self._graphs[key] = self._capture(key, arguments)
            self.captures += 1
        captured = self._graphs[key]
        torch._foreach_copy_(captured.inputs, _tensors(arguments), non_blocking=True)
        captured.replay()
        found = captured.found.output(asked.real)
        return replace(found, loss=_Handed.apply(found.loss, captured.gradients, *captured.parameters))

    def _capture(self, key: tuple[int, int], arguments: tuple[Any, ...]) -> _Captured:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self._gradients:
            self._gradients = {p: torch.zeros_like(p) for p in trained}
        inputs = [tensor.clone() for tensor in _tensors(arguments)]

        def work() -> tuple[Losses, list[nn.Parameter]]:
            given, factors = _with_tensors(arguments, inputs)
            found: Losses = self.model(*given, per_size=True)
            # A term's factor differs between batches, so it enters as a gradient, in fp32. A term of a frozen encoder
            # alone has none.
            pairs = [pair for pair in zip(found.terms, factors, strict=True) if pair[0].requires_grad]
            terms, incoming = zip(*pairs, strict=True)
            made = torch.autograd.grad(terms, trained, incoming, allow_unused=True)
            used = [(p, g) for p, g in zip(trained, made, strict=True) if g is not None]
            torch._foreach_copy_([self._gradients[p] for p, _ in used], [g for _, g in used])
            values = tuple(term.detach() * factor for term, factor in zip(found.terms, factors, strict=True))
            return Losses(values, found.target, found.rows, found.places), [p for p, _ in used]

        try:
            (found, used), replay = self._recorder.record(work)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"train.cuda_graph: a step of {key[0]} context and {key[1]} predicted tokens cannot be captured "
                f"({reason}): set it to false"
            ) from error
        return _Captured(inputs, found, used, [self._gradients[p] for p in used], replay)


def _own(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensor of each argument but the factors, of segments their bounds; then the terms' random numbers."""
    *given, sampled, _ = arguments
    return [*(part.cu_seqlens if isinstance(part, Segments) else part for part in given), *sampled]


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor of a call's arguments, each once; the terms' factors, the last argument, as one each."""
    found: dict[int, Tensor] = {}
    for tensor in _own(arguments):
        found.setdefault(id(tensor), tensor)
    device = next(iter(found.values())).device
    # Fills, not copies from the host.
    return [*found.values(), *(torch.full((), factor, dtype=torch.float32, device=device) for factor in arguments[-1])]


def _with_tensors(arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[list[Any], Sequence[Tensor]]:
    """The same call with other tensors, in the order of `_tensors`, and the factors as tensors."""
    own = _own(arguments)
    order = list(dict.fromkeys(id(tensor) for tensor in own))
    other = dict(zip(order, tensors, strict=False))
    made: dict[int, Segments] = {}
    given: list[Any] = []
    *parts, sampled, _ = arguments
    for part, tensor in zip(parts, own[: len(parts)], strict=True):
        if isinstance(part, Segments):
            same = Segments(part.lengths, other[id(tensor)], part.padding, part.ceiling)
            given.append(made.setdefault(id(part), same))
        else:
            given.append(other[id(tensor)])
    given.append(tuple(other[id(tensor)] for tensor in sampled))
    return given, tensors[len(order) :]
