"""The step as a picture: its parts one after another, and the memory that was held meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_step", "step_figure"]


def draw_step(
    parts: Mapping[str, float], step_s: float, steps: int, memory: Sequence[tuple[float, int]], picture: Path
) -> None:  # fmt: skip
    """Write `step_figure` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = step_figure(parts, step_s, steps, memory)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def step_figure(
    parts: Mapping[str, float], step_s: float, steps: int, memory: Sequence[tuple[float, int]]
) -> Figure:  # fmt: skip
    """One step and the memory held meanwhile.

    parts: seconds by name, in order; step_s: of the same step, the middle one of `steps`; memory: (seconds, bytes) over
    the traced steps.
    """
    import matplotlib.pyplot as plt

    figure: Figure
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 5), layout="constrained")
    left = 0.0
    for number, (name, seconds) in enumerate(parts.items()):
        above.barh(0, seconds * 1e3, left=left * 1e3, color=f"C{number}", label=f"{name}: {seconds / step_s:.1%}")
        left += seconds
    above.axvline(step_s * 1e3, color="black", lw=1)
    above.set(
        yticks=[],
        xlabel="milliseconds; the line is the end of this step",
        title=f"parts of the step of median time of {steps}" if steps > 1 else "parts of the only step",
    )
    above.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    below.step([s * 1e3 for s, _ in memory], [b / 2**20 for _, b in memory], where="post", lw=0.8)
    below.set(xlabel="milliseconds of the traced steps", ylabel="MiB above the start", title="memory held")
    below.grid(alpha=0.3)
    return figure
