"""`iwm-fast data`: draw, look at and check images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iwm_fast.arguments import config_and_overrides
from iwm_fast.commands.options import Json, answer

__all__ = ["app"]

app = typer.Typer(help="Draw, look at and check images.", no_args_is_help=True)


@app.command(epilog="Example: iwm-fast data synth --out shapes --train 4096 --test 800")
def synth(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")],
    classes: Annotated[int, typer.Option("--classes", min=2, max=8, help="Kinds of image.")] = 8,
    train: Annotated[int, typer.Option("--train", min=1, help="Training images in all.")] = 4096,
    test: Annotated[int, typer.Option("--test", min=1, help="Test images in all.")] = 800,
    size: Annotated[int, typer.Option("--size", min=16, help="Side, pixels.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
) -> None:
    """Draw a labelled set of JPEGs, for those with no data at hand."""
    from iwm_fast.data.synth import draw_dataset

    draw_dataset(out, classes=classes, train=train, test=test, size=size, seed=seed)
    typer.echo(f"{out}: drawn; train on data.root={out / 'train'}")


@app.command(epilog="Example: iwm-fast data preview photos --out views --count 8 vit_tiny_p4_32.yaml")
def preview(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="Folder for the pictures and params.json.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG KEY.PATH=VALUE...", help="Default: vit_base_p16_224_equi.yaml."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Images.")] = 8,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Default: train.seed of the configuration.")] = None,
) -> None:
    """Write the views, masks and parameters of some images as training would draw them."""
    from iwm_fast.config.load import find_config, load_config

    name, overrides = config_and_overrides(words or [], "vit_base_p16_224_equi.yaml")
    config = load_config(find_config(name), overrides)
    from iwm_fast.data.preview import write_preview

    write_preview(config, root, out, count, config.train.seed if seed is None else seed)
    typer.echo(f"{out}: {count} images drawn, parameters in {out / 'params.json'}")


@app.command(epilog="Example: iwm-fast data verify photos --json verdict.json")
def verify(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.")],
    json: Json = None,
) -> None:
    """Decode every image as training would and name those that cannot be. Training skips and replaces them."""
    from iwm_fast.console import print_table
    from iwm_fast.data.verify import verify as verify_images

    verdict = verify_images(root)
    if json != "-":
        typer.echo(f"{root}: {verdict['decoded']} of {verdict['files']} files decode")
        if verdict["bad"]:
            print_table("cannot be used", ("file", "reason"), [(bad["file"], bad["reason"]) for bad in verdict["bad"]])
    answer(json, "data-verify", verdict)
