"""`iwm-fast data`: generate, preview, record, verify, index and pack images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from iwm_fast.cli.arguments import config_and_overrides
from iwm_fast.cli.completion import config_or_overrides
from iwm_fast.cli.options import Json, answer, byte_count, key_values
from iwm_fast.errors import UserError

__all__ = ["app"]

Root = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Folder of images, of .tar shards or of TFRecord files, s3://bucket/prefix, or a manifest.",
    ),
]


class Kind(StrEnum):
    """The values of data.source."""

    AUTO = "auto"
    FOLDER = "folder"
    WEBDATASET = "webdataset"
    TFRECORD = "tfrecord"


SourceKind = Annotated[Kind, typer.Option("--source", help="Kind of source, if DIR has several.")]

app = typer.Typer(help="Generate, preview, record, verify, index and pack images.", no_args_is_help=True)


@app.command(epilog="Example: iwm-fast data synth --out shapes --train 4096 --test 800")
def synth(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")],
    classes: Annotated[int, typer.Option("--classes", min=2, max=8, help="Number of classes.")] = 8,
    train: Annotated[int, typer.Option("--train", min=1, help="Number of training images.")] = 4096,
    test: Annotated[int, typer.Option("--test", min=1, help="Number of test images.")] = 800,
    size: Annotated[int, typer.Option("--size", min=16, help="Image size, pixels.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1)] = 0,
    *,
    segments: Annotated[
        bool, typer.Option("--segments", help="Write images/ and masks/ with a class per pixel, not class folders.")
    ] = False,
) -> None:
    """Generate a labelled set of JPEGs, to try commands without data."""
    if classes > min(train, test):
        raise UserError(
            f"--classes {classes}: more than --train {train} or --test {test}; give an image per class at least"
        )
    from iwm_fast.data.tools.synth import draw_dataset

    draw_dataset(out, classes=classes, train=train, test=test, size=size, seed=seed, segments=segments)
    print(f"{out}: generated; train on data.root={out / 'train'}")


@app.command(epilog="Example: iwm-fast data preview photos --out views --count 8 vit_tiny_p4_32.yaml")
def preview(
    root: Root,
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT", help="Write the pictures and params.json to this folder.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY.PATH=VALUE...",
            help="Default: vit_base_p16_224_equi.yaml.",
            autocompletion=config_or_overrides,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Images.")] = 8,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Default: train.seed of the configuration.")
    ] = None,
) -> None:
    """Write the views, masks and parameters of some images as training generates them, and one sheet that shows them
    side by side: OUT/contact_sheet.png.
    """
    from iwm_fast.config.load import find_config, load_config

    name, overrides = config_and_overrides(words or [], "vit_base_p16_224_equi.yaml")
    config = load_config(find_config(name), overrides)
    from iwm_fast.data.tools.preview import write_preview

    sheet, shown = write_preview(config, root, out, count, config.train.seed if seed is None else seed)
    print(f"{out}: views of {count} images, parameters in {out / 'params.json'}")
    print(f"{sheet}: {'all of them' if shown == count else f'the first {shown}'} side by side")


@app.command(epilog="Example: iwm-fast data record Pendulum-v1 --out pendulum --frames 4000 --repeat 3 --motion")
def record(
    env: Annotated[str, typer.Argument(metavar="ENV", help="Id of a gymnasium environment that renders images.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")],
    frames: Annotated[int, typer.Option("--frames", min=1, help="Number of training triplets.")] = 4000,
    test: Annotated[int, typer.Option("--test", min=0, help="Number of test triplets, from other episodes.")] = 1000,
    size: Annotated[int, typer.Option("--size", min=16, help="Size of the pictures, pixels.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1)] = 0,
    repeat: Annotated[
        int, typer.Option("--repeat", "--action-repeat", min=1, help="Environment steps per action.")
    ] = 1,
    episode_steps: Annotated[
        int | None, typer.Option("--episode-steps", min=1, help="Cut an episode after this many actions.")
    ] = None,
    motion: Annotated[
        bool, typer.Option("--motion", help="Store the last three steps in grey as channels, to show speed.")
    ] = False,
    still: Annotated[
        bool, typer.Option("--still", help="Turn what never changes to mid-grey, to show only what moves.")
    ] = False,
    crop: Annotated[
        tuple[float, float, float, float],
        typer.Option("--crop", metavar="LEFT TOP RIGHT BOTTOM", help="Crop to this box, in shares of the rendering."),
    ] = (0.0, 0.0, 1.0, 1.0),
    names: Annotated[
        str, typer.Option("--names", help="Names of choices or components, separated by commas; default: numbers.")
    ] = "",
    argument: Annotated[
        list[str] | None,
        typer.Option("--env-argument", metavar="KEY=VALUE", help="Argument of gymnasium.make; repeatable."),
    ] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option("--reset-option", metavar="KEY=VALUE", help="Option of the environment's reset; repeatable."),
    ] = None,
    persistence: Annotated[
        float,
        typer.Option(
            "--persistence", min=0, max=1, help="Probability that the last action is kept: exploration gets further."
        ),
    ] = 0.0,
    absorbing: Annotated[
        bool,
        typer.Option(
            "--absorbing", help="Record that an ended episode stays as it ended, so that no plan leads through its end."
        ),
    ] = False,
) -> None:
    """Record triplets (picture, action, next picture) of a game played at random, to train on with game.yaml.

    DIR/train and DIR/test each hold manifest.jsonl, with the environment's state where it observes numbers, its
    pictures, and recording.json: how it was recorded, which iwm-fast act reads. The same command gives the same files.
    """
    from iwm_fast.console import counting
    from iwm_fast.data.tools.record_gym import Recording
    from iwm_fast.data.tools.record_gym import record as record_game

    asked = Recording(
        env, frames, test, size, seed, repeat, episode_steps, motion, still, crop,
        names=tuple(name.strip() for name in names.split(",")) if names else (),
        arguments=key_values(argument, "--env-argument", "is_slippery=false"),
        persistence=persistence,
        reset=key_values(reset, "--reset-option", "low=-1.1"),
        absorbing=absorbing,
    )  # fmt: skip
    with counting() as progress:
        actions = record_game(asked, out, progress)
    told = f"one of {len(actions.names)}" if actions.kind == "discrete" else f"{len(actions.names)} number(s)"
    print(f"{out}: recorded, an action is {told}; train with game.yaml on data.root={out / 'train'}")


@app.command(epilog="Example: iwm-fast data verify photos --json verdict.json")
def verify(
    root: Root,
    source: SourceKind = Kind.AUTO,
    max_pixels: Annotated[
        int | None, typer.Option("--max-pixels", min=1, help="Value of data.max_pixels; default: its default.")
    ] = None,
    json: Json = None,
) -> None:
    """Decode every image as training does, and name those that fail. Training replaces them.

    The exit code is 1 if a file is unusable, 0 if none is.
    """
    from iwm_fast.console import counting, print_table
    from iwm_fast.data.tools.verify import verify as verify_images

    with counting() as progress:
        verdict = verify_images(root, source=source, max_pixels=max_pixels, progress=progress)

    def show() -> None:
        print(f"{root}: {verdict['decoded']} of {verdict['files']} files decode ({verdict['source']})")
        if verdict["bad"]:
            print_table("cannot be used", ("file", "reason"), [(bad["file"], bad["reason"]) for bad in verdict["bad"]])

    answer(json, "data-verify", verdict, show)
    if verdict["bad"]:
        raise typer.Exit(1)


@app.command(epilog="Example: iwm-fast data index photos/train")
def index(
    root: Root,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the manifest here; default: DIR/iwm-fast-manifest.tsv."),
    ] = None,
    source: SourceKind = Kind.AUTO,
    *,
    check: Annotated[bool, typer.Option("--check", help="Also check each image, so that a training need not.")] = False,
    json: Json = None,
) -> None:
    """Write a manifest of all images (path, bytes, size, label, checksum): a training then need not list them.

    After an interruption the same command resumes. Files that change later are detected by length and checksum when
    they are read, and treated as bad; index again after adding or changing files: only these are read.
    """
    from iwm_fast.console import counting
    from iwm_fast.data.tools.index import write_index

    with counting() as progress:
        written = write_index(root, out, source=source, check=check, progress=progress)

    def show() -> None:
        print(
            f"{written['manifest']}: {written['samples']} images of {written['source']}, {written['bytes']} bytes, "
            f"{written['classes']} classes"
        )
        if written["resumed"]:
            print(f"{written['resumed']} rows of an interrupted run were reused")
        if written["unchanged"]:
            print(f"{written['unchanged']} images are unchanged and were not read again")
        if check:
            found = written["checked"]
            print(
                f"checked: DALI decodes {found['plain']} directly, Pillow decodes {found['pillow']}, "
                f"{found['bad']} are bad"
            )
        if written["unreadable"]:
            print(f"{written['unreadable']} have no readable header; iwm-fast data verify says why")

    answer(json, "data-index", written, show)


@app.command(epilog="Example: iwm-fast data shard photos/train --out shards/train --shard-size 256MB")
def shard(
    root: Root,
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="Write the shards to this folder.")],
    shard_size: Annotated[
        str,
        typer.Option("--shard-size", metavar="SIZE", help="Size of a shard in bytes, KB, MB or GB (powers of 1024)."),
    ] = "256MB",
    source: SourceKind = Kind.AUTO,
    json: Json = None,
) -> None:
    """Pack images into WebDataset tar shards with the indexes of DALI's reader; the same images give the same bytes.

    After an interruption the same command resumes at the first missing shard.
    """
    from iwm_fast.console import counting
    from iwm_fast.data.tools.shard import write_shards

    with counting() as progress:
        written = write_shards(root, out, source=source, shard_bytes=byte_count(shard_size), progress=progress)
    kept = f", {written['resumed']} of them reused from an interrupted run" if written["resumed"] else ""
    line = f"{written['out']}: {written['samples']} images in {written['shards']} shards{kept}"
    answer(json, "data-shard", written, lambda: print(line))
