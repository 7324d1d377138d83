"""The command line: each command parses its arguments, calls the package, and prints the result.

Commands import what they need inside, so that ``--help`` is fast and ``data synth`` does not load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from iwm_fast.cli import bench, data, finetune
from iwm_fast.cli.act import act
from iwm_fast.cli.arguments import check_options, prepare
from iwm_fast.cli.compare import compare
from iwm_fast.cli.config import show_config
from iwm_fast.cli.embed import embed
from iwm_fast.cli.export import export
from iwm_fast.cli.options import CacheLimit, Json, Overrides, answer
from iwm_fast.cli.plan import plan
from iwm_fast.cli.pretrain import pretrain
from iwm_fast.cli.profile import profile
from iwm_fast.errors import UserError
from iwm_fast.eval.defaults import CACHE_LIMIT_GB
from iwm_fast.eval.registry import full_help, what_help
from iwm_fast.programs import CtrlC, one_line, run_program
from iwm_fast.version import __version__

__all__ = ["app", "main"]


class _Group(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise CtrlC from error  # typer makes an exit code of KeyboardInterrupt


app = typer.Typer(
    name="iwm-fast",
    cls=_Group,
    help="Pretrain, evaluate and export Image World Models (arXiv:2403.00504).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.command(epilog="Example: iwm-fast plan vit_large_p16_224.yaml --nodes 4 --gpus-per-node 8 --gpu h200")(plan)
app.command(epilog="Example: iwm-fast embed runs/a photos --out features.parquet")(embed)
app.add_typer(finetune.app)
app.add_typer(bench.app, name="bench")
app.command(epilog="Example: iwm-fast profile vit_tiny_p8_96.yaml train.global_batch=32 --out prof")(profile)


def _version(asked: bool) -> None:
    if asked:
        print(f"iwm-fast {__version__}")
        raise typer.Exit


@app.callback()
def _globally(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also after a command.")
    ] = False,
) -> None:
    """Handled elsewhere: the version in its callback, --debug before the parser runs."""
    del version, debug


@app.command(epilog="Example: iwm-fast demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Write the images, the run and the report to this folder.")],
    overrides: Overrides = None,
    json: Json = None,
) -> None:
    """Generate images, pretrain a tiny world model, evaluate it and write a report, in minutes on a CPU."""
    from iwm_fast.cli.demo import demo as run_demo
    from iwm_fast.cli.demo import demo_rows
    from iwm_fast.console import counting, print_table

    def give(figures: dict[str, Any]) -> None:
        shown.close()  # the bars, so that the table stands alone
        answer(json, "demo", figures, lambda: print_table("iwm-fast demo", ("", "value", ""), demo_rows(figures)))

    with ExitStack() as shown:
        run_demo(out, overrides or [], shown.enter_context(counting()), give)


app.command(
    epilog="Example: iwm-fast pretrain vit_tiny_p4_32.yaml data.root=photos/train train.seed=1 --out runs/a    "
    "then: iwm-fast pretrain --out runs/a --resume auto"
)(pretrain)


@app.command(epilog="Example: iwm-fast evaluate runs/a --data photos --what mrr,knn,linear --json a.json")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of pretrain or export.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Images: train/ and test/ (or val/) in it, or to be split; s3:// too; triplets.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.PATH=VALUE...",
            help="Override keys of eval, data and the jitter's strength; others are refused.",
        ),
    ] = None,
    what: Annotated[
        str | None,
        typer.Option("--what", help=what_help()),
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="latest, step_000500, or a path to it.")] = "latest",
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Number of images ranked for MRR; default: the run's.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Folder of cached features; default: RUN/cache, of an export a temporary one.",
        ),
    ] = None,
    cache_limit: CacheLimit = CACHE_LIMIT_GB,
    full: Annotated[
        bool,
        typer.Option("--full", help=full_help()),
    ] = False,
    json: Json = None,
) -> None:
    """Evaluate a run's world model and representation, print a table and write RUN/report/index.html.

    The exit code is 1 if an evaluation named by --what could not run; the others run all the same.
    """
    from iwm_fast.console import counting, print_table
    from iwm_fast.eval.report.terminal import result_lines, result_rows
    from iwm_fast.eval.run import evaluate_run

    def show(results: dict[str, Any]) -> None:
        columns = ("", "value", "95 % interval", "chance", "shuffled action", "neutral action", "untrained")
        rows = result_rows(results)
        if rows:
            print_table(f"iwm-fast evaluate, step {results['step']}", columns, rows)
        for line in result_lines(results):
            print(line)

    def give(results: dict[str, Any]) -> None:
        shown.close()  # the bars, so that the table stands alone
        answer(json, "evaluate", results, lambda: show(results))

    words = None if what is None else [word.strip() for word in what.split(",") if word.strip()]
    with ExitStack() as shown:
        results = evaluate_run(
            run,
            data,
            what=words,
            checkpoint=checkpoint,
            images=images,
            components=True,
            full=full,
            cache=cache,
            cache_limit=cache_limit,
            overrides=overrides or [],
            progress=shown.enter_context(counting()),
            give=give,
            report=json is None,
        )
    if json != "-" and results["report"] is not None:
        print(f"report: {results['report']}")
    if words is not None and results.get("not_run", {}).keys() & set(words):
        raise typer.Exit(1)


app.command(epilog="Example: iwm-fast act runs/room iwm_fast/PointMassWalls-v0 --out acted --episodes 5 --horizon 10")(
    act
)
app.command(epilog="Example: iwm-fast export runs/a --out weights/a --format transformers,timm")(export)
app.command(epilog="Example: iwm-fast compare runs/a runs/b --out comparison")(compare)
app.command(
    "config", epilog="Example: iwm-fast config vit_tiny_p4_32.yaml train.lr=5e-4    or: iwm-fast config --schema"
)(show_config)


@app.command(epilog="Example: iwm-fast doctor")
def doctor(json: Json = None) -> None:
    """Show for each part of the stack its version, whether a run here uses it, and why not.

    The exit code is 1 if a part that a run needs does not work.
    """
    from dataclasses import asdict

    from iwm_fast.cli.doctor import examine, part_rows
    from iwm_fast.console import print_table

    parts = examine()
    columns = ("part", "version", "used", "how, or why not")
    answer(
        json,
        "doctor",
        {"parts": [asdict(part) for part in parts]},
        lambda: print_table("iwm-fast doctor", columns, part_rows(parts)),
    )
    broken = [part.part for part in parts if part.broken]
    if broken:
        typer.echo(f"iwm-fast doctor: broken: {', '.join(broken)}; the table says why", err=True)
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for errors of the user (one line), 130 after Ctrl-C.

    1 is a result: doctor found a broken part, data verify a bad file, bench compare a slowdown, evaluate --what an
    evaluation that could not run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    from iwm_fast.log_filters import quiet_third_parties

    quiet_third_parties()

    def called() -> Any:
        words, _ = prepare(given)
        command = typer.main.get_command(app)
        check_options(command, words)
        return command.main(words, prog_name="iwm-fast", standalone_mode=False)

    return run_program(
        "iwm-fast",
        called,
        debug=debug,
        describe=_one_line,
        mendable=(UserError, typer.TyperException, OSError),
        ends_process=arguments is None,
    )


def _one_line(error: Exception) -> str:
    if not isinstance(error, typer.TyperException):
        return one_line(error)
    message = str(error.format_message())
    context = getattr(error, "ctx", None)  # of errors in the usage, the command they were made with
    if message and context is not None:
        message += f" See {context.command_path} --help."
    return " ".join(message.split())  # nothing after a bare "iwm-fast data", which has printed its help
