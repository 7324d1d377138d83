"""Export a run: one folder per format, each with a model card.

| format | opened by | module |
|---|---|---|
| iwm | `iwm_fast.load`, `iwm-fast evaluate`, `embed` and `compare`; timm and plain PyTorch | `iwm_format` |
| timm | `timm.create_model("local-dir:…")` | `timm_format` |
| transformers | `AutoModel.from_pretrained` | `transformers_format` |
| pt2 | `torch.export.load` | `graph_formats` |
| onnx | an ONNX runtime | `graph_formats` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iwm_fast.atomic_files import whole_folder
from iwm_fast.errors import UserError
from iwm_fast.export.card import write_card
from iwm_fast.export.described import Trained, open_trained, several_frames
from iwm_fast.export.graph_formats import write_onnx_format, write_pt2
from iwm_fast.export.iwm_format import write_iwm
from iwm_fast.export.onnx import require_onnx
from iwm_fast.export.timm_format import write_timm
from iwm_fast.export.transformers_format import no_class, write_transformers
from iwm_fast.outputs import require_new_folder, writing

__all__ = ["FORMATS", "export_run", "export_trained"]


def _fits(_trained: Trained) -> None:
    """Every run fits."""


def _no_class(trained: Trained) -> str | None:
    return no_class(trained) or several_frames(trained)


@dataclass(frozen=True)
class Format:
    """write: a run's checkpoint into an existing folder. unfit: why the format cannot hold it, or None."""

    write: Callable[[Trained, Path], None]
    unfit: Callable[[Trained], str | None] = _fits


FORMATS = {
    "iwm": Format(write_iwm),
    "timm": Format(write_timm),
    "transformers": Format(write_transformers, _no_class),
    "pt2": Format(write_pt2, several_frames),
    "onnx": Format(write_onnx_format, several_frames),
}


def export_run(
    run: Path, out: Path, which: str = "latest", *, formats: Sequence[str] = ("iwm",), onnx: bool = False
) -> Path:
    """Write a checkpoint in one or several of `FORMATS` into the new folder ``out``; return it.

    One format's files are in ``out``, of several each in a folder of ``out`` with the format's name. A README.md beside
    them is the model card. ``onnx``: also write graphs beside the files of iwm. The folder appears whole or not at all.
    Raises UserError for an unknown format, one whose libraries are missing, and one that cannot hold the run.
    """
    chosen = _chosen(formats, onnx=onnx)
    require_new_folder(out)
    return export_trained(open_trained(run, which), out, chosen, onnx=onnx)


def export_trained(trained: Trained, out: Path, formats: Sequence[str], *, onnx: bool = False) -> Path:
    """Write a loaded checkpoint as `export_run` does."""
    for name in formats:
        why = FORMATS[name].unfit(trained)
        if why is not None:
            fit = [other for other, one in FORMATS.items() if one.unfit(trained) is None]
            raise UserError(f"--format {name}: {why}; give one or more of {', '.join(fit)}")
    if onnx and (why := several_frames(trained)) is not None:
        raise UserError(f"--onnx: {why}; leave it out")
    with writing(out), whole_folder(out) as partial:
        for name in formats:
            folder = partial if len(formats) == 1 else partial / name
            folder.mkdir(exist_ok=True)
            if name == "iwm":
                write_iwm(trained, folder, onnx=onnx)
            else:
                FORMATS[name].write(trained, folder)
            write_card(trained, folder, name)
    return out


def _chosen(formats: Sequence[str], *, onnx: bool) -> list[str]:
    """Return the formats once each. Raises UserError where one is unknown, or a library that it needs is missing."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format {unknown[0] if unknown else '(empty)'}: give one or more of {', '.join(FORMATS)}")
    if onnx and "iwm" not in formats:
        instead = ",".join(dict.fromkeys((*formats, "onnx")))
        raise UserError(f"--onnx adds graphs to the format iwm, which --format leaves out; give --format {instead}")
    if onnx or "onnx" in formats:
        require_onnx("--onnx" if onnx else "--format onnx")
    return list(dict.fromkeys(formats))
