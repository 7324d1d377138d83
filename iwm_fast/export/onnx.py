"""Write the networks as ONNX graphs on whole images, and compare each with its network."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iwm_fast.errors import UserError
from iwm_fast.export.graphs import Graph, require_equal, write_graphs
from iwm_fast.file_names import utf8_name
from iwm_fast.models.iwm import IWM

__all__ = ["OPSET", "require_onnx", "write_onnx"]

OPSET = 20  # the first with Gelu as one operator


def require_onnx(option: str) -> None:
    """Raise UserError where onnx, onnxscript or onnxruntime is not installed; ``option`` names what needs them."""
    try:
        import onnx  # noqa: F401  (torch's exporter needs both, and says so less clearly)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{option} needs {error.name}, which is not installed: pip install 'iwm-fast[onnx]'") from error


def write_onnx(model: IWM, folder: Path) -> dict[str, str]:
    """Write encoder, target encoder (where it is separate) and predictor as .onnx; return file names by part.

    Inputs and outputs are those of `graphs.SIGNATURES`; B is free. Weights lie inside, or in a .data file beside where
    a graph would pass ONNX's limit of 2 GiB. Raises UserError where a graph differs from its network.
    """
    return write_graphs(model, folder, ".onnx", _write)


def _write(graph: Graph, path: Path) -> None:
    """Write one graph, exported on a batch of two and compared on a batch of three."""
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.network,
            graph.traced,
            input_names=list(graph.inputs),
            output_names=[graph.output],
            dynamic_shapes=graph.dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
        )
        assert program is not None  # with a path it would be
        with utf8_name(path) as name:
            program.save(name)
    require_equal(path.name, graph, lambda inputs: _run(path, inputs))


def _run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    with utf8_name(path) as name:
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(np.asarray(session.run(None, arrays)[0]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's steps on standard output, and torch's notes on its next version."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # says that torchvision is not there
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
