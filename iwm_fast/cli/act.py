"""`iwm-fast act`: reach a goal in an environment by planning with a trained world model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from iwm_fast.cli.options import Json, answer, key_values

__all__ = ["act"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of pretrain on triplets, or its export.")]
Env = Annotated[str, typer.Argument(metavar="ENV", help="Id of the gymnasium environment that was recorded.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet.")]
Goal = Annotated[
    str,
    typer.Option(
        "--goal",
        metavar="PICTURE|auto",
        help="auto: the environment's own. A file: a recorded frame, or a rendering of the environment's size.",
    ),
]
Repeat = Annotated[
    int | None, typer.Option("--action-repeat", min=1, help="Environment steps per action. Default: as recorded.")
]
Decisions = Annotated[
    int | None, typer.Option("--decisions", min=1, help="Most actions per episode. Default: the environment's limit.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DIR", help="Recorded triplets, for their pictures. Default: what RUN was trained on."
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--env-argument", metavar="KEY=VALUE", help="Argument of gymnasium.make, over those recorded; repeatable."
    ),
]


def act(
    run: Run,
    env: Env,
    out: Out,
    goal: Goal = "auto",
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Episodes to play.")] = 5,
    replan: Annotated[int, typer.Option("--replan", min=1, help="Plan again after this many actions.")] = 1,
    action_repeat: Repeat = None,
    horizon: Annotated[int, typer.Option("--horizon", help="Actions that are planned, 1 or more.")] = 8,
    method: Annotated[
        Literal["cem", "mppi", "gradient"],
        typer.Option("--method", help="Search for a plan; gradient: of continuous actions only."),
    ] = "cem",
    candidates: Annotated[
        int | None,
        typer.Option("--candidates", min=1, help="Sequences per iteration. Default: 1000; gradient: 32."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="Of the search. Default: 5; gradient: 40.")
    ] = None,
    distance: Annotated[
        Literal["l2", "cosine", "state"],
        typer.Option(
            "--distance",
            help="To the goal: over all tokens, of the mean tokens, or between the states that are read from both.",
        ),
    ] = "l2",
    score: Annotated[
        Literal["last", "mean", "nearest", "arrival"],
        typer.Option(
            "--score", help="A plan's cost: distance of its last prediction, mean, nearest; arrival: last + 0.1 · mean."
        ),
    ] = "mean",
    policy: Annotated[
        Literal["plan", "greedy", "shuffled", "random"],
        typer.Option(
            "--policy", help="Controls: one step ahead; given another plan's actions; the recording's player."
        ),
    ] = "plan",
    decisions: Decisions = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the episodes and the search.")] = 0,
    gifs: Annotated[int, typer.Option("--gifs", min=0, help="Episodes to write as GIFs, the first ones.")] = 1,
    data: Data = None,
    argument: Arguments = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="latest, step_000500, or a path to it.")] = "latest",
    json: Json = None,
) -> None:
    """Reach a goal in an environment: plan with a run's world model, hold the first actions, look, plan again.

    Writes DIR/episodes.json (per episode: success, steps, return, predicted costs, seed) after each episode,
    DIR/index.html, a page with the first one, and DIR/episode_NNN.gif with the pictures, the recorded frames nearest to
    what was predicted, and the distances. The environment is drawn as recording.json beside the run's data says.
    """
    from iwm_fast.console import counting, print_table
    from iwm_fast.eval.acting.act import Acting, open_actor, summary
    from iwm_fast.eval.acting.act import act as play
    from iwm_fast.eval.world_model.planning.plan import Settings
    from iwm_fast.outputs import require_new_folder

    require_new_folder(out)
    settings = Settings(horizon, method, candidates, iterations, distance, score, seed).checked()
    asked = Acting(
        env, goal, episodes, replan, action_repeat, decisions, policy, settings, seed,
        key_values(argument, "--env-argument", "is_slippery=false"), gifs,
    )  # fmt: skip
    with ExitStack() as shown:
        actor = open_actor(run, checkpoint, data)
        records = play(actor, asked, out=out, progress=shown.enter_context(counting()))
    found = summary(records)

    def show() -> None:
        print_table(f"iwm-fast act, step {actor.step}", ("", "value", "95 % interval"), _rows(found, len(records)))
        print(f"{out / 'episodes.json'}: every episode; {out / 'index.html'}: the first")

    answer(json, "act", {"env": env, "policy": policy, **found, "episodes": records}, show)


def _rows(found: dict[str, Any], episodes: int) -> list[tuple[str, str, str]]:
    low, high = found["success_interval"]
    return [
        (f"success, {episodes} episodes", f"{found['success']:.2f}", f"{low:.2f} – {high:.2f}"),
        ("return, mean", f"{found['return']:.2f}", ""),
        ("steps, mean", f"{found['steps']:.1f}", ""),
    ]
