"""Folders of graphs on whole images: ONNX files, or programs of `torch.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iwm_fast.engine.checkpoint.load import EXPORT_FILE, GRAPHS_SCHEMA
from iwm_fast.export.described import TOKENS, Trained, write_json
from iwm_fast.export.graphs import SIGNATURES
from iwm_fast.export.onnx import OPSET, write_onnx
from iwm_fast.export.programs import write_programs

__all__ = ["add_onnx", "write_onnx_format", "write_pt2"]

_INPUT = "uint8 RGB (batch, side, side, 3)"


def write_onnx_format(trained: Trained, folder: Path) -> None:
    """Write ONNX files and a config.json that describes them."""
    about = _about(trained, "onnx") | {"files": {}}
    add_onnx(trained, folder, about)
    write_json(folder / EXPORT_FILE, about)


def add_onnx(trained: Trained, folder: Path, described: dict[str, Any]) -> None:
    """Write ONNX files, and note them in ``described``."""
    graphs = write_onnx(trained.model, folder)
    described["onnx"] = {"opset": OPSET, "input": _INPUT, **graphs, "signatures": _signatures(graphs)}
    described["files"] |= _entries(trained, graphs, "onnx")


def write_pt2(trained: Trained, folder: Path) -> None:
    """Write programs of `torch.export` and a config.json that describes them."""
    programs = write_programs(trained.model, folder)
    about = _about(trained, "pt2") | {"pt2": {"input": _INPUT, **programs, "signatures": _signatures(programs)}}
    write_json(folder / EXPORT_FILE, about | {"files": _entries(trained, programs, "torch.export")})


def _about(trained: Trained, name: str) -> dict[str, Any]:
    own = {"format": name, "evaluated_encoder": trained.evaluated, "input": _INPUT}
    return trained.described() | {"schema": GRAPHS_SCHEMA} | own


def _signatures(graphs: dict[str, str]) -> dict[str, Any]:
    return {part: SIGNATURES[part] for part in graphs}


def _entries(trained: Trained, graphs: dict[str, str], layout: str) -> dict[str, Any]:
    """What each file holds; the parts of graphs are encoder, target_encoder and predictor."""
    short = {"encoder": "context", "target_encoder": "target", "predictor": "predictor"}
    return {file: trained.file_entry(short[part], layout, TOKENS) for part, file in graphs.items()}
