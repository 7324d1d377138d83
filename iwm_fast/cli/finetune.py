"""`iwm-fast finetune`: train a run on labelled images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from iwm_fast.cli.options import CacheLimit, Json, answer
from iwm_fast.errors import UserError
from iwm_fast.eval.defaults import CACHE_LIMIT_GB

__all__ = ["app"]

app = typer.Typer()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of pretrain.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[NAME=]DIR",
        help="Labelled images: train/ and test/ (or val/) with one folder per class, or with images/ and masks/. "
        "Repeat for multitask.",
    ),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE...", help="Override keys of the section data, such as data.max_bad_fraction."
    ),
]
Mode = Annotated[
    str, typer.Option("--mode", help="Part to train: linear, attentive, predictor, end-to-end or multitask.")
]
Kind = Annotated[
    str | None, typer.Option("--task", help="classification or segmentation; default: from the folders' layout.")
]
Init = Annotated[
    str | None, typer.Option("--init", help="Predictor's initial weights: pretrained (default), or random to compare.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="OUT", help="Save the result to this new folder.")]
Epochs = Annotated[float, typer.Option("--epochs", min=0.01, help="Epochs over the training images.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Number of steps, instead of epochs.")]
Rates = Annotated[
    str | None,
    typer.Option("--lr", help="Peak learning rate of the head, or several to try, separated by commas."),
]
Batch = Annotated[int, typer.Option("--batch", min=2, help="Images per step.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0.0)]
Limit = Annotated[int | None, typer.Option("--limit", min=2, help="Use at most this many training images.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
WhichCheckpoint = Annotated[str, typer.Option("--checkpoint", help="latest, step_000500, or a path to it.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Folder of cached features; default: RUN/cache.")
]


@app.command(epilog="Example: iwm-fast finetune runs/a --mode predictor --data photos --out runs/a-photos")
def finetune(
    run: Run,
    data: Data,
    overrides: DataOverrides = None,
    mode: Mode = "predictor",
    task: Kind = None,
    init: Init = None,
    out: Out = None,
    epochs: Epochs = 20.0,
    steps: Steps = None,
    lr: Rates = None,
    batch: Batch = 128,
    weight_decay: WeightDecay = 0.01,
    limit: Limit = None,
    seed: Seed = 0,
    checkpoint: WhichCheckpoint = "latest",
    cache: Cache = None,
    cache_limit: CacheLimit = CACHE_LIMIT_GB,
    json: Json = None,
) -> None:
    """Train a head, the world model with a head, or the whole network on labelled images, and test it on others.

    Pretrained parts train at a tenth of the learning rate. Loss and test score are printed during training, and are in
    the JSON. --out also writes OUT/report/index.html with their curves, and iwm_fast.load(OUT) classifies or
    segments; without it only the metrics are printed.
    """
    rates = _rates(lr)
    from iwm_fast.console import counting
    from iwm_fast.environment import environment
    from iwm_fast.eval.finetune.run import Request, finetune_run, named_folders
    from iwm_fast.eval.finetune.saved import REPORT

    def give(results: dict[str, Any]) -> None:
        progress.close()  # the bars, before the table
        answer(json, "finetune", results, lambda: _show(results))

    with ExitStack() as progress:
        request = Request(
            mode=mode,  # type: ignore[arg-type]  # checked there, with the other options
            data=named_folders(data),
            kind=task,
            init=init,  # type: ignore[arg-type]
            epochs=epochs,
            steps=steps,
            rates=rates,
            batch=batch,
            weight_decay=weight_decay,
            limit=limit,
            seed=seed,
            checkpoint=checkpoint,
            cache=cache,
            cache_limit=cache_limit,
            overrides=overrides or (),
            tell=progress.enter_context(counting()),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        finetune_run(run, request, out, environment(), give, _page)
    if out is not None and json != "-":
        print(f"weights: {out}\nreport: {out / REPORT}")


def _show(results: dict[str, Any]) -> None:
    from iwm_fast.console import print_table
    from iwm_fast.eval.finetune.result_rows import HEAD, finetune_lines, finetune_rows

    title = f"iwm-fast finetune, {results['mode']}, {results['trained_parameters']:,} parameters trained"
    print_table(title, HEAD, finetune_rows(results))
    for line in finetune_lines(results):
        print(line)


def _page(name: str, results: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    from iwm_fast.eval.report.finetune_page import finetune_page  # which loads Matplotlib

    return finetune_page(name, results, environment)


def _rates(text: str | None) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(f"--lr {text}: give a number, or several separated by commas, such as 3e-4,1e-3") from error
