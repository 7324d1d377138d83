"""Write the networks as programs of `torch.export` on whole images, and compare each with its network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from iwm_fast.export.graphs import Graph, require_equal, write_graphs
from iwm_fast.file_names import utf8_name
from iwm_fast.models.iwm import IWM

__all__ = ["write_programs"]


def write_programs(model: IWM, folder: Path) -> dict[str, str]:
    """Write encoder, target encoder (where it is separate) and predictor as .pt2; return file names by part.

    `torch.export.load(FILE).module()` needs torch only, of the version that wrote it or a later one. Inputs and outputs
    are those of `graphs.SIGNATURES`; B is free. Raises UserError where a program differs from its network.
    """
    return write_graphs(model, folder, ".pt2", _write)


def _write(graph: Graph, path: Path) -> None:
    """Write one program, exported on a batch of two and compared, as read back, on a batch of three."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notes on its next version
        program = torch.export.export(graph.network, graph.traced, dynamic_shapes=graph.dynamic_shapes)
        try:
            with utf8_name(path) as name:
                torch.export.save(program, name)
        except RuntimeError as error:  # its error on a full disk
            raise OSError(" ".join(str(error).split())) from error

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), utf8_name(path) as name:
            found: Tensor = torch.export.load(name).module()(*inputs.values())
        return found

    require_equal(path.name, graph, answer)
