"""The networks that exported graphs hold, with inputs to trace and compare them on; common to ONNX and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.errors import UserError
from iwm_fast.export.dense import WholeEncoder, WholePredictor
from iwm_fast.models.iwm import IWM

__all__ = ["SIGNATURES", "Graph", "require_equal", "write_graphs"]

_LARGEST_BATCH = 2**16
# Inputs and outputs of each graph; batch is free.
_ENCODER = {"inputs": {"images": "uint8 (batch, side, side, 3), RGB"}, "outputs": {"tokens": "float32 (batch, L, D)"}}
_PREDICTOR = {
    "inputs": {"tokens": "float32 (batch, L, D) of the context encoder", "action": "float32 (batch, A)"},
    "outputs": {"predicted": "float32 (batch, L, D of the target)"},
}
SIGNATURES: dict[str, dict[str, Any]] = {"encoder": _ENCODER, "target_encoder": _ENCODER, "predictor": _PREDICTOR}
# Relative to a result's largest value: ten times the measured rounding of fp32 in another order (ViT-B/16 8e-7, its
# predictor of 18 layers 1.1e-6), far below the error of a wrong graph.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Graph:
    """One network on whole images. part: encoder, target_encoder or predictor. inputs: a batch of three."""

    part: str
    network: nn.Module
    inputs: dict[str, Tensor]
    output: str

    @property
    def traced(self) -> tuple[Tensor, ...]:
        """The inputs to trace with: a batch of two, so that the comparison is on another size."""
        return tuple(value[:2] for value in self.inputs.values())

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """Of each input: its batch is free."""
        batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
        return tuple({0: batch} for _ in self.inputs)


def write_graphs(model: IWM, folder: Path, suffix: str, write: Callable[[Graph, Path], None]) -> dict[str, str]:
    """Write encoder, target encoder (where it is separate) and predictor, each by ``write``; return file names by part.

    Inputs and outputs are those of `SIGNATURES`; the batch is free.
    """
    written = {}
    for graph in _graphs(model):
        written[graph.part] = f"{graph.part}{suffix}"
        write(graph, folder / written[graph.part])
    return written


def _graphs(model: IWM) -> list[Graph]:
    """Return encoder, target encoder (where it is separate) and predictor, in fp32 on the CPU."""
    model = model.cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    side, patches, width = model.config.image, model.encoder.patches, model.encoder.width
    images = {"images": torch.randint(0, 256, (3, side, side, 3), generator=generator, dtype=torch.uint8)}
    told = {
        "tokens": torch.randn(3, patches, width, generator=generator),
        "action": torch.randn(3, model.action_dim, generator=generator),
    }
    found = [Graph("encoder", WholeEncoder(model.encoder).eval(), images, "tokens")]
    if model.target_encoder is not None:
        found.append(Graph("target_encoder", WholeEncoder(model.target_encoder).eval(), images, "tokens"))
    return [*found, Graph("predictor", WholePredictor(model.predictor).eval(), told, "predicted")]


def require_equal(file: str, graph: Graph, answer: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Raise UserError where a written graph's ``answer`` differs from its network's."""
    with torch.no_grad():
        want = graph.network(*graph.inputs.values())
    found = answer(graph.inputs)
    error = float((found - want).abs().max() / want.abs().max())
    if found.shape != want.shape or not error <= _TOLERANCE:
        raise UserError(f"{file}: the graph differs from the network by {error:.1e} of its largest number; report it")
