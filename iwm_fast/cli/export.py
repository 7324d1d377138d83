"""`iwm-fast export`: a run's weights for other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iwm_fast.errors import UserError

__all__ = ["export"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of pretrain.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")]
WhichCheckpoint = Annotated[str, typer.Option("--checkpoint", help="latest, step_000500, or a path to it.")]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="NAME,...",
        help="iwm (default), timm, transformers, pt2 (torch.export), onnx; of several, each in a folder of its own.",
    ),
]
Onnx = Annotated[bool, typer.Option("--onnx", help="Also write ONNX graphs of whole images, checked with onnxruntime.")]
Layout = Annotated[str, typer.Option("--layout", help="weights, or universal: DeepSpeed's layout, optimizer included.")]


def export(
    run: Run,
    out: Out,
    checkpoint: WhichCheckpoint = "latest",
    format: Formats = None,  # noqa: A002  (the option's name)
    onnx: Onnx = False,
    layout: Layout = "weights",
) -> None:
    """Write encoder, target encoder and predictor in formats that other libraries open, each with a model card."""
    from iwm_fast.export.deepspeed_universal import export_universal
    from iwm_fast.export.weights import export_run

    if layout not in ("weights", "universal"):
        raise UserError(f"--layout {layout}: give weights or universal")
    chosen = [word.strip() for text in format or ("iwm",) for word in text.split(",") if word.strip()]
    if layout == "universal":
        for given, option in ((onnx, "--onnx"), (format, "--format")):
            if given:
                what = "DeepSpeed's layout has no graphs" if option == "--onnx" else "DeepSpeed's layout is its own"
                raise UserError(f"{option} needs --layout weights: {what}; export twice, to two --out")
        written = export_universal(run, out, checkpoint)
    else:
        written = export_run(run, out, checkpoint, formats=chosen, onnx=onnx)
    for path in sorted(written.rglob("*") if layout == "weights" else written.iterdir()):
        if layout == "universal" or path.is_file():
            print(path)
