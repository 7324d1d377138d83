"""Play episodes with a run, and write what happened: episodes.json, a page, and GIFs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from iwm_fast.actions.external import ExternalSpace
from iwm_fast.atomic_files import write_whole_text
from iwm_fast.config import Config
from iwm_fast.console import Count
from iwm_fast.data.tools.record_gym import episode_seed
from iwm_fast.data.triplets import Triplets, read_triplets
from iwm_fast.engine.checkpoint.load import default_device
from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.eval.acting.animation import write_gif
from iwm_fast.eval.acting.episodes import POLICIES, Planner, Policy, PolicyName, RandomPlayer, play_episode
from iwm_fast.eval.acting.frames import Resizer, find_neighbours
from iwm_fast.eval.acting.page import acting_page, episode_section
from iwm_fast.eval.opened import OpenedExport, opened
from iwm_fast.eval.report.page import Section
from iwm_fast.eval.stats import wilson_interval
from iwm_fast.eval.world_model.frames import find_triplets
from iwm_fast.eval.world_model.planning.plan import Settings, require_planning
from iwm_fast.eval.world_model.planning.state_head import StateHead, fit_state_head
from iwm_fast.games.goals import auto_goal, picture_goal
from iwm_fast.games.play import Game
from iwm_fast.games.recording import Pixels, Recording, read_recording
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_new_folder, writing
from iwm_fast.results import write_result

__all__ = ["Acting", "Actor", "act", "open_actor", "summary"]

_ACTED = 0x5EED  # added to a recording's seed: acted episodes are not the recorded ones
_BANK = 512  # recorded frames among which neighbours are found


@dataclass(frozen=True)
class Acting:
    """What to do. goal: "auto", or a picture's path. every: decisions per plan. repeat: environment steps per action,
    None: as recorded. most: decisions per episode, None: the environment's limit. arguments: of gymnasium.make, over
    the recorded ones. gifs: episodes of which a GIF is written.
    """

    env: str
    goal: str = "auto"
    episodes: int = 1
    every: int = 1
    repeat: int | None = None
    most: int | None = None
    policy: PolicyName = "plan"
    settings: Settings = field(default_factory=Settings)
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gifs: int = 1


@dataclass(frozen=True, eq=False)
class Actor:
    """A run, its folder's name, and the recording of its data."""

    name: str
    model: IWM
    config: Config
    space: ExternalSpace
    step: int
    triplets: Triplets
    recording: Recording | None
    background: Pixels | None


def open_actor(run: Path, checkpoint: str = "latest", data: str | None = None) -> Actor:
    """Open a run or an export, and the triplets under ``data``, by default those that the run was trained on.

    Raises UserError where it was not trained on triplets, or these are gone.
    """
    source = opened(run, checkpoint)
    if not source.external:
        raise UserError(
            f"{run}: has no actions to act with: it was trained on images, whose actions are changes of a picture; "
            "train on a recorded game, as docs/guides/act.md shows"
        )
    source.require_weights()
    model, config, space, step = source.load(())
    assert isinstance(space, ExternalSpace)
    root = data if data is not None else None if isinstance(source, OpenedExport) else config.data.root
    if root is None:
        raise UserError(f"{run}: an export, which does not name its data: give --data DIR")
    if data is None and not Path(root).exists():
        raise UserError(f"{run}: its data, {root}, are not there: give --data DIR")
    triplets = read_triplets(find_triplets(root)[0], config.actions.external)
    found = read_recording(triplets.manifest.parent)
    recording, background = (None, None) if found is None else found
    return Actor(run.resolve().name, model.to(default_device()), config, space, step, triplets, recording, background)


def act(
    actor: Actor,
    acting: Acting,
    *,
    out: Path | None = None,
    known: Iterable[Mapping[str, Any]] = (),
    progress: Count | None = None,
    give: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Play the episodes and return the record of each; ``give`` gets all of them after each episode.

    out: a new folder for episodes.json, index.html with the first episode, and GIFs. known: records of earlier
    episodes, which are not played again.
    """
    _check(acting)
    horizon = 1 if acting.policy == "greedy" else acting.settings.horizon
    plans = acting.policy != "random"
    require_planning(actor.space, horizon, actor.config.unread if plans else None)
    if out is not None:
        require_new_folder(out)
    reads_states = plans and acting.settings.distance == "state"
    head = fit_state_head(actor.model, actor.config.data, actor.triplets) if reads_states else None
    records = [dict(record) for record in known]
    section: Section | None = None
    shown = plans and out is not None
    made_with = environment() if out is not None else {}
    with _opened_game(actor, acting) as game, closing(Resizer(actor.config.model.image)) as resize:
        policy = _policy(actor, acting, resize, head)
        goal = auto_goal if acting.goal == "auto" else partial(_of_file, Path(acting.goal))
        neighbours = find_neighbours(actor.model, actor.config.data, actor.triplets, _BANK) if shown else None
        for number in range(len(records), acting.episodes):
            seed = episode_seed(acting.seed + _ACTED, number)
            repeat = acting.repeat or game.recording.repeat
            episode = play_episode(game, policy, goal, number=number, seed=seed, repeat=repeat, most=acting.most)
            records.append(episode.record())
            if out is not None:
                body = _body(actor, acting, game, head, records)
                write_result(out / "episodes.json", "act", body)
                section = section or episode_section(episode, neighbours)
                page = acting_page(actor.name, body, section, made_with)
                with writing(out):
                    write_whole_text(out / "index.html", page)
                    if number < acting.gifs:
                        write_gif(out / f"episode_{number:03d}.gif", episode, neighbours)
            if give is not None:
                give(records)
            if progress is not None:
                progress("episodes", number + 1, acting.episodes)
    return records


def _of_file(path: Path, game: Game) -> Pixels:
    return picture_goal(game, path)


def _check(acting: Acting) -> None:
    acting.settings.checked()
    if acting.policy not in POLICIES:
        raise UserError(f"--policy {acting.policy}: give {', '.join(POLICIES)}")
    if acting.every < 1 or acting.episodes < 1:
        raise UserError(f"--replan {acting.every}, --episodes {acting.episodes}: both must be at least 1")


def _policy(actor: Actor, acting: Acting, resize: Resizer, head: StateHead | None) -> Policy:
    if acting.policy == "random":
        return RandomPlayer()
    settings = replace(acting.settings, seed=acting.seed, shuffled=acting.policy == "shuffled")
    every = acting.every
    if acting.policy == "greedy":
        settings, every = replace(settings, horizon=1), 1
    return Planner(actor.model, actor.space, settings, resize, every, head)


@contextmanager
def _opened_game(actor: Actor, acting: Acting) -> Iterator[Game]:
    """Yield the environment, with pictures as recorded. Raises UserError where its actions are not the run's."""
    recording = actor.recording
    if recording is None:
        recording = Recording(acting.env, 0, 0, size=actor.config.model.image)
    same = recording.env == acting.env
    arguments = {**((recording.arguments or {}) if same else {}), **acting.arguments}
    made = replace(recording, env=acting.env, arguments=arguments, reset={}, seed=acting.seed + _ACTED)
    with closing(Game(made, actor.background)) as game:
        _require_same_actions(actor, game)
        yield game


def _require_same_actions(actor: Actor, game: Game) -> None:
    ours, theirs = actor.space.external, game.actions
    said = [
        f"one of {len(actions.names)} choices"
        if actions.kind == "discrete"
        else f"{len(actions.names)} numbers from {list(actions.low)} to {list(actions.high)}"
        for actions in (theirs, ours)
    ]
    if said[0] != said[1]:
        raise UserError(
            f"{game.recording.env}: its actions are {said[0]}, and the run was trained on {said[1]}: act in the "
            "environment whose recording it was trained on"
        )


def _body(
    actor: Actor, acting: Acting, game: Game, head: StateHead | None, records: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "env": acting.env,
        "step": actor.step,
        "goal": acting.goal,
        "policy": acting.policy,
        "replan": acting.every,
        "action_repeat": acting.repeat or game.recording.repeat,
        "seed": acting.seed,
        "plan": {key: value for key, value in asdict(acting.settings.checked()).items() if key not in _NOT_TOLD},
        "state_r2": None if head is None else head.r2.tolist(),
        **summary(records),
        "episodes": records,
    }


_NOT_TOLD = ("seed", "shuffled")


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of successes with its 95 % interval (Wilson), and the mean return and steps."""
    successes = sum(record["success"] for record in records)
    return {
        "success": successes / len(records),
        "success_interval": list(wilson_interval(successes, len(records))),
        "return": sum(record["return"] for record in records) / len(records),
        "steps": sum(record["steps"] for record in records) / len(records),
    }
