"""An episode as a GIF: what is seen, the goal, the recorded frames nearest to what is predicted, and the distances."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from iwm_fast.atomic_files import write_whole
from iwm_fast.eval.acting.episodes import Decision, Episode
from iwm_fast.eval.acting.frames import Neighbours, spread
from iwm_fast.games.recording import Pixels

__all__ = ["write_gif"]

_WIDTH, _LARGE, _GAP, _LINE = 560, 160, 10, 16
_MOST = 8  # predicted frames that are shown, evenly spread over the plan
_MS, _LAST_MS = 300, 1500
_INK, _PAPER, _FAINT, _BLUE, _RED = (30, 30, 30), (255, 255, 255), (200, 200, 200), (40, 90, 200), (210, 60, 40)
_CHART = 110  # pixels high


def write_gif(path: Path, episode: Episode, neighbours: Neighbours | None) -> None:
    """Write an episode of at least one decision. Without neighbours, or of a random player, nothing is predicted.

    Raises OSError where it cannot be written.
    """
    pages = [_page(episode, place, neighbours) for place in range(len(episode.decisions))]
    pages.append(_page(episode, len(episode.decisions), neighbours))
    frames = [page.quantize(128) for page in pages]
    times = [_MS] * (len(frames) - 1) + [_LAST_MS]
    write_whole(
        path,
        lambda file: frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0),
    )


def _page(episode: Episode, place: int, neighbours: Neighbours | None) -> Image.Image:
    """Draw the picture before decision `place`, or the last one, with the plan that was followed there."""
    over = place == len(episode.decisions)
    decision = episode.decisions[min(place, len(episode.decisions) - 1)]
    small = (_WIDTH - (_MOST + 1) * _GAP) // _MOST
    plan = decision.plan
    height = 2 * _GAP + _LINE + _LARGE
    height += (4 * _GAP + 2 * _LINE + small + _CHART) if plan is not None else 0
    page = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(page)
    said = f"seen, decision {place}" if not over else ("reached" if episode.success else "not reached")
    for column, (title, picture) in enumerate(
        ((said, episode.last if over else decision.picture), ("goal", episode.goal))
    ):
        x = _GAP + column * (_LARGE + _GAP)
        draw.text((x, 2), title, _INK)
        page.paste(_scaled(picture, _LARGE), (x, _GAP + _LINE))
    x = _GAP + 2 * (_LARGE + _GAP)
    lines = [f"episode {episode.number}", f"{episode.steps} steps, return {episode.reward:.2f}"]
    if plan is not None and decision.distance is not None and not over:
        lines += [f"distance to the goal {decision.distance:.2f}", f"predicted cost {plan.cost:.2f}"]
    for number, line in enumerate(lines):
        draw.text((x, _GAP + _LINE * (number + 1)), line, _INK)
    if plan is not None:
        top = 2 * _GAP + _LINE + _LARGE
        draw.text((_GAP, top), "recorded frames nearest to what the plan predicts", _INK)
        if neighbours is not None:
            _paste_predicted(page, decision, neighbours, top + _LINE, small)
        _draw_chart(draw, episode, place, top + 2 * _LINE + small + _GAP)
    return page


def _paste_predicted(page: Image.Image, decision: Decision, neighbours: Neighbours, top: int, side: int) -> None:
    assert decision.plan is not None
    steps = spread(len(decision.plan.actions), _MOST)
    for column, picture in enumerate(neighbours.nearest(decision.plan.predictions[steps])):
        page.paste(_scaled(picture, side), (_GAP + column * (side + _GAP), top))


def _draw_chart(draw: ImageDraw.ImageDraw, episode: Episode, place: int, top: int) -> None:
    """Draw the distance of each picture so far, and from now on those that the plan predicts, on one scale."""
    seen = [d.distance for d in episode.decisions if d.distance is not None]
    now = min(place, len(seen) - 1)
    decision = episode.decisions[now]
    assert decision.plan is not None
    ahead = [float(far) for far in decision.plan.along[decision.step :]]
    every = [*seen, *(far for d in episode.decisions if d.plan is not None for far in d.plan.along)]
    high, count = max(every) or 1.0, len(seen) + len(decision.plan.along)
    draw.text((_GAP, top - _LINE), "distance to the goal: seen (blue), predicted (red)", _INK)
    left, bottom = _GAP, top + _CHART - _GAP
    draw.line([(left, bottom), (_WIDTH - _GAP, bottom)], _FAINT)

    def dot(place: int, far: float) -> tuple[float, float]:
        return left + place * (_WIDTH - 2 * _GAP) / max(count, 1), bottom - far / high * (_CHART - 3 * _GAP)

    for color, values, first in ((_BLUE, seen[: now + 1], 0), (_RED, [seen[now], *ahead], now)):
        dots = [dot(first + number, far) for number, far in enumerate(values)]
        if len(dots) > 1:
            draw.line(dots, color, 2)
        for x, y in dots:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)


def _scaled(picture: Pixels, side: int) -> Image.Image:
    return Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
