"""`iwm-fast embed`: features of images, in a file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from iwm_fast.cli.options import Json, answer

__all__ = ["embed"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of pretrain or export.")]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Folder of images, of .tar shards or of TFRecord files, s3://bucket/prefix, or a manifest.",
    ),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE...", help="Override keys of the section data, such as data.max_bad_fraction."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        help="New file to write: FEATURES.parquet, or .npz, which must fit in memory.",
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="target|context",
        help="Encoder to use; default: the target encoder, if it is an EMA, else the context encoder.",
    ),
]
Pool = Annotated[
    str, typer.Option("--pool", metavar="mean|none", help="mean: one vector per image; none: one per patch.")
]
WhichCheckpoint = Annotated[str, typer.Option("--checkpoint", help="latest, step_000500, or a path to it.")]


def embed(
    run: Run,
    data: Data,
    out: Out,
    overrides: DataOverrides = None,
    encoder: Encoder = None,
    pool: Pool = "mean",
    checkpoint: WhichCheckpoint = "latest",
    json: Json = None,
) -> None:
    """Write the features of all images of a folder into one file, in the order of their names.

    Columns: key (the image's name below DIR), feature (float32), and where the images have them label, class and split.
    Images are cropped to the centered square and resized, as evaluate does; those that cannot be decoded are left out
    and named in the metadata, with the encoder, the resolution and the configuration. Runs in one process, on one
    device.
    """
    from iwm_fast.console import counting
    from iwm_fast.eval.embed import embed_images, embed_lines

    with ExitStack() as progress:
        results = embed_images(
            run,
            data,
            out,
            encoder=encoder,  # type: ignore[arg-type]  # checked there, with the other options
            pool=pool,  # type: ignore[arg-type]
            checkpoint=checkpoint,
            overrides=overrides or (),
            progress=progress.enter_context(counting()),
        )
    answer(json, "embed", results, lambda: print("\n".join(embed_lines(results))))
