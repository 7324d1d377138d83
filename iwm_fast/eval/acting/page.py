"""The page of acting: how often the goal was reached, and one episode with what was foreseen."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from iwm_fast.eval.acting.episodes import Decision, Episode
from iwm_fast.eval.acting.frames import Neighbours, spread
from iwm_fast.eval.report.charts import tracks
from iwm_fast.eval.report.page import Block, Charts, Fold, Picture, Section, Strips, Table, document, facts, percent
from iwm_fast.file_names import printable

__all__ = ["acting_page", "episode_section"]

_PLANS = 8  # shown, spread evenly over the episode
_AHEAD = 8  # predictions shown of a plan, spread evenly over it
_FRAMES = 16  # shown of an episode without plans


def acting_page(name: str, results: Mapping[str, Any], episode: Section, environment: Mapping[str, Any]) -> str:
    """Return one self-contained HTML page. ``results``: what episodes.json holds. ``episode``: of `episode_section`."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    count = len(results["episodes"])
    low, high = results["success_interval"]
    rows = [
        ["success", percent(results["success"]), f"{percent(low)} – {percent(high)}"],
        ["return, mean", f"{results['return']:.2f}", ""],
        ["steps, mean", f"{results['steps']:.1f}", ""],
    ]
    said = {key: value for key, value in results.items() if key != "episodes"}
    sections = [
        Section(f"{count} episode{'s' if count > 1 else ''}", [Table(("", "value", "95 % interval (Wilson)"), rows)]),
        episode,
        Section("How it was made", [Fold("Settings", facts(said)), Fold("Environment", facts(environment))]),
    ]
    lead = f"step {results['step']} · policy {results['policy']} · {when}"
    return document(f"{printable(name)}, acting", printable(name), lead, [printable(results["env"])], sections)


def episode_section(episode: Episode, neighbours: Neighbours | None) -> Section:
    """Return what was seen and foreseen in an episode. Without neighbours, predicted frames are not shown."""
    end = "the goal was reached" if episode.success else "the goal was not reached"
    title = f"Episode {episode.number}: {end} after {episode.steps} steps"
    ends = (
        ("first", [Picture.of(episode.decisions[0].picture, "0")]),
        ("last", [Picture.of(episode.last, str(len(episode.decisions)))]),
        ("goal", [Picture.of(episode.goal, "goal", asked=True)]),
    )
    blocks: list[Block] = [Strips("What was seen, and the goal", ends)]
    planned = [number for number, one in enumerate(episode.decisions) if one.plan is not None and one.step == 0]
    if not planned:
        shown = spread(len(episode.decisions), _FRAMES)
        pictures = [Picture.of(episode.decisions[number].picture, str(number)) for number in shown]
        return Section(title, [*blocks, Strips("No plans: a player at random", [("after so many actions", pictures)])])
    seen = [one.distance for one in episode.decisions if one.distance is not None]
    foreseen = {number: one.plan.along.tolist() for number in planned if (one := episode.decisions[number]).plan}
    blocks.append(Charts([tracks(seen, foreseen, name="along", across="action", label="distance to the goal")]))
    if neighbours is not None:
        some = [planned[place] for place in spread(len(planned), _PLANS)]
        blocks += [_plan(number, episode.decisions[number], neighbours) for number in some]
    note = (
        "Distance: of representations, or of the states that are read from them, as the settings below say. Each line "
        "that leaves what was seen is a plan: what was foreseen of its actions, of which the first ones were done."
    )
    return Section(title, blocks, [note])


def _plan(number: int, decision: Decision, neighbours: Neighbours) -> Strips:
    """What was seen when a plan was made, and the recorded frames nearest to what it predicts."""
    assert decision.plan is not None
    steps = spread(len(decision.plan.actions), _AHEAD)
    near = neighbours.nearest(decision.plan.predictions[steps])
    ahead = [Picture.of(picture, f"+{step + 1}") for step, picture in zip(steps, near, strict=True)]
    after = f"After {number} action{'' if number == 1 else 's'}"
    title = f"{after}: distance {decision.distance:.2f}, cost of the plan {decision.plan.cost:.2f}"
    seen = [Picture.of(decision.picture, "seen")]
    return Strips(title, [("seen", seen), ("recorded frames nearest to what the plan predicts", ahead)])
