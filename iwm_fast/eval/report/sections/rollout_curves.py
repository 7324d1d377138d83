"""The roll-outs' section: the error over the horizon, beside copying the first frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iwm_fast.eval.report.charts import Line, lines
from iwm_fast.eval.report.dates import Dated
from iwm_fast.eval.report.drawing import Drawing, Figure, Headline, Results
from iwm_fast.eval.report.page import Block, Charts, Section, Table, number

__all__ = ["RolloutDrawing"]

_SHOWN = 4  # components of the state, in the terminal


class RolloutDrawing(Drawing):
    """The error at each horizon, and that of copying the first frame: smaller is better."""

    def figures(self, results: Results) -> list[Figure]:
        """Return none: a roll-out has a figure per horizon, which are rows."""
        del results
        return []

    def rows(self, results: Results) -> list[list[str]]:
        """Return two rows per horizon, three where states are recorded."""
        rolled = results.get("rollout")
        if rolled is None:
            return []
        rows: list[list[str]] = []
        for place, horizon in enumerate(rolled["horizons"]):
            for name, key in (("error", "model"), ("error of a copy", "copy")):
                low, high = rolled[f"{key}_interval"][place]
                shuffled = f"{rolled['shuffled'][place]:.4f}" if key == "model" else ""
                cells = [f"{rolled[key][place]:.4f}", f"{low:.4f} – {high:.4f}", "", shuffled, "", ""]
                rows.append([f"roll-out, {name}, {horizon} ahead", *cells])
            if "state_r2" in rolled:
                read = [f"{value:.2f}" for value in rolled["state_r2"]["prediction"][place] if value is not None]
                shown = ", ".join([*read[:_SHOWN], *(["…"] if len(read) > _SHOWN else [])])
                rows.append([f"roll-out, R² of the state, {horizon} ahead", shown, *[""] * 5])
        return rows

    def headline(self, name: str, results: Results) -> Headline:
        """Return the error of the first step."""
        rolled = results[name]
        return Headline(rolled["model"][0], rolled["model_interval"][0])

    def section(self, results: Results, said: Dated) -> Section | None:
        """Return curves with their bands, and a table."""
        rolled = results.get("rollout")
        if rolled is None:
            return None
        names = {"model": "world model", "shuffled": "shuffled actions", "copy": "copy of the first frame"}
        drawn = [Line(name, rolled[key], rolled[f"{key}_interval"]) for key, name in names.items()]
        chart = lines(
            rolled["horizons"], drawn, name=f"rollout{said.end}", across="horizon, actions", label="mean square error"
        )
        rows = [[name, *(number(value) for value in rolled[key])] for key, name in names.items()]
        protocol = (
            f"From each of {rolled['starts']} frames, predictions are fed back to the predictor with the next action. "
            "Error: mean squared difference, over tokens and channels, from the target representation of the true "
            "frame. Bands: 95 % interval by bootstrap over roll-outs. Training predicts the first steps "
            "alone (train.horizon)."
        )
        blocks: list[Block] = [Charts([chart]), Table(["horizon", *map(str, rolled["horizons"])], rows)]
        notes = [protocol]
        if "state_r2" in rolled:
            blocks.append(_states(rolled["state_r2"], rolled["horizons"]))
            notes.append(
                "R² of the recorded state, read by linear heads that are fitted on the targets of other episodes. "
                "Where it is read from the targets and not from predictions, no plan can work."
            )
        return Section(said.title("Roll-outs"), blocks, [*notes, *said.lines("rollout")])


def _states(r2: Mapping[str, Any], horizons: Sequence[int]) -> Table:
    """A row per component of the state: R² from the targets, and from the prediction at each horizon."""
    rows = [
        [str(place), *("" if value is None else f"{value:.2f}" for value in (read, *along))]
        for place, (read, along) in enumerate(zip(r2["target"], zip(*r2["prediction"], strict=True), strict=True))
    ]
    return Table(["state, R²", "targets", *map(str, horizons)], rows)
