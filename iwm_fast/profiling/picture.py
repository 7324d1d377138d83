"""The step as a picture: its parts one after another, and the memory that was held meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["draw_step"]


def draw_step(
    parts: Mapping[str, float], step_s: float, memory: Sequence[tuple[float, int]], picture: Path
) -> None:  # fmt: skip
    """Write a PNG. parts: seconds by name, in order; memory: (seconds, bytes) over the traced steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 5), layout="constrained")
    left = 0.0
    for number, (name, seconds) in enumerate(parts.items()):
        above.barh(0, seconds * 1e3, left=left * 1e3, color=f"C{number}", label=f"{name}: {seconds / step_s:.1%}")
        left += seconds
    above.axvline(step_s * 1e3, color="black", lw=1)
    above.set(yticks=[], xlabel="milliseconds; the line is the median step", title="parts of a step")
    above.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    below.step([s * 1e3 for s, _ in memory], [b / 2**20 for _, b in memory], where="post", lw=0.8)
    below.set(xlabel="milliseconds of the traced steps", ylabel="MiB above the start", title="memory held")
    below.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
