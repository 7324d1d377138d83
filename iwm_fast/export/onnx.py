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
from torch import Tensor, nn

from iwm_fast.errors import UserError
from iwm_fast.export.dense import WholeEncoder, WholePredictor
from iwm_fast.file_names import utf8_name
from iwm_fast.models.iwm import IWM

__all__ = ["OPSET", "write_onnx"]

OPSET = 20  # the first with Gelu as one operator
# Relative to a result's largest value: ten times the measured rounding of fp32 in another order (ViT-B/16 8e-7, its
# predictor of 18 layers 1.1e-6), far below the error of a wrong graph.
_TOLERANCE = 1e-5


def write_onnx(model: IWM, folder: Path) -> dict[str, str]:
    """Write encoder, target encoder (where it is separate) and predictor as .onnx; return file names by part.

    encoder.onnx, target_encoder.onnx: images uint8 (B, S, S, 3), RGB -> tokens float32 (B, L, D). predictor.onnx:
    tokens float32 (B, L, D), action float32 (B, A) -> predicted float32 (B, L, D). B is free. Weights lie inside, or in
    a .data file beside where a graph would pass ONNX's limit of 2 GiB. Raises UserError where onnx, onnxscript or
    onnxruntime is not installed, or a graph differs from its network.
    """
    try:
        import onnx  # noqa: F401  (torch's exporter needs both, and says so less clearly)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}, which is not installed: pip install 'iwm-fast[onnx]'") from error
    model = model.cpu().float().eval()
    size, patches, width = model.config.image, model.encoder.patches, model.encoder.width
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, size, size, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randn(3, patches, width, generator=generator)
    action = torch.randn(3, model.action_dim, generator=generator)
    written = {"encoder": "encoder.onnx", "predictor": "predictor.onnx"}
    _write(WholeEncoder(model.encoder), {"images": images}, "tokens", folder / written["encoder"])
    if model.target_encoder is not None:
        written["target_encoder"] = "target_encoder.onnx"
        _write(WholeEncoder(model.target_encoder), {"images": images}, "tokens", folder / written["target_encoder"])
    inputs = {"tokens": tokens, "action": action}
    _write(WholePredictor(model.predictor), inputs, "predicted", folder / written["predictor"])
    return written


def _write(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Write one graph, exported on a batch of two and compared on a batch of three."""
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(value[:2] for value in inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
        )
        assert program is not None  # with a path it would be
        with utf8_name(path) as name:
            program.save(name)
        want = module(*inputs.values()).numpy()
    found = _run(path, {name: value.numpy() for name, value in inputs.items()})
    error = float(np.abs(found - want).max() / np.abs(want).max())
    if found.shape != want.shape or not error <= _TOLERANCE:
        raise UserError(
            f"{path.name}: the graph differs from the network by {error:.1e} of its largest number; report it"
        )


def _run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    with utf8_name(path) as name:
        session = onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


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
