"""The picture of `benchmarks.scale`: a panel per unit, logarithmic axes, each line with its fitted exponent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PANELS", "draw_scale"]


class _Panel(NamedTuple):
    """rows: of the result. size: the column of the x axis. lines: column → label. goals: label → value."""

    title: str
    unit: str
    rows: str
    size: str
    lines: dict[str, str]
    goals: dict[str, float]


PANELS = (
    _Panel(
        "Launcher's store",
        "calls, keys read",
        "ranks",
        "ranks",
        {
            "meeting_calls": "meeting, calls of all ranks",
            "meeting_keys_read": "meeting, keys read by all",
            "look_keys_read": "look for a lost host, keys read by all",
            "look_calls": "look, calls of all ranks",
            "look_most_calls_of_a_rank": "look, calls per rank",
            "meeting_most_calls_of_a_rank": "meeting, calls per rank",
        },
        {"goal: 10 calls per rank": 10},
    ),
    _Panel(
        "Messages and files",
        "bytes",
        "ranks",
        "ranks",
        {
            "meeting_bytes_read": "meeting, read by all ranks",
            "look_bytes_read": "look, read by all ranks",
            "index_stage_1_index_bytes": "checkpoint's index, stage 1",
            "index_stage_3_index_bytes": "checkpoint's index, stage 3",
            "index_stage_1_most_bytes_sent_by_a_rank": "sent for it per rank, stage 1",
            "index_stage_3_most_bytes_sent_by_a_rank": "sent for it per rank, stage 3",
        },
        {},
    ),
    _Panel(
        "Simulated on this machine",
        "seconds",
        "ranks",
        "ranks",
        {
            "meeting_seconds": "meeting, all ranks as threads",
            "look_seconds": "look, all ranks as threads",
            "index_stage_1_layout_seconds": "laying out the index, stage 1",
            "index_stage_3_layout_seconds": "laying out the index, stage 3",
            "index_stage_1_read_seconds": "reading it, stage 1",
            "index_stage_3_read_seconds": "reading it, stage 3",
        },
        {},
    ),
    _Panel(
        "Start of a rank, order of an epoch",
        "seconds",
        "images",
        "images",
        {
            "manifest_index_s": "reading a manifest without an index, once per file system",
            "first_batch_s": "first batch",
            "open_s": "opening the manifest",
            "row_s": "a row at a random place",
            "order_s_per_sample": "order, per sample",
        },
        {"goal: first batch in 5 s": 5.0, "goal: order in 1 µs per sample": 1e-6},
    ),
    _Panel(
        "Memory of a rank, and files",
        "bytes",
        "images",
        "images",
        {
            "manifest_text_bytes": "manifest, on disk",
            "manifest_index_bytes": "its index, on disk",
            "private_bytes": "private memory of a rank",
            "order_peak_bytes": "the order's part of it",
        },
        {"goal: 100 MB private": 1e8},
    ),
    _Panel(
        "gloo groups and the store",
        "sockets",
        "sockets",
        "processes",
        {"sockets_of_the_first": "first rank", "sockets_per_process": "every other rank"},
        {"goal: 16 per process": 16},
    ),
)


def draw_scale(result: dict[str, Any], exponents: dict[str, dict[str, float]], path: Path) -> None:
    """Draw a result of `benchmarks.scale` to a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(17.0, 13.0), layout="constrained")
    for panel, ax in zip(PANELS, axes.flat, strict=True):
        rows, found = result[panel.rows], exponents.get(panel.rows, {})
        sizes = [row[panel.size] for row in rows]
        lines = [name for name in panel.lines if any(row.get(name) for row in rows)]
        for name in sorted(lines, key=lambda name: -(rows[-1].get(name) or 0)):
            grows = f"  ∝ n^{found[name] + 0.0:.2f}".replace("-0.00", "0.00") if name in found else ""
            values = [row.get(name) for row in rows]
            ax.plot(sizes, values, marker="o", label=f"{panel.lines[name]}{grows}")
        for label, value in panel.goals.items():
            ax.axhline(value, color="grey", linestyle=":", linewidth=1.0)
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
            ax.annotate(label, (0.99, value), fontsize=9, color="dimgrey", **place)
        ax.set(xscale="log", yscale="log", xlabel=panel.size, ylabel=panel.unit, title=f"{panel.title}: {panel.unit}")
        ax.set_xticks(sizes, [f"{size:g}" if size < 1e5 else f"{size:.0e}".replace("e+0", "e") for size in sizes])
        ax.minorticks_off()
        ax.grid(visible=True, alpha=0.3)
        ax.margins(y=0.12)
        if lines:
            ax.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.savefig(path, dpi=90, format="png")
    plt.close(figure)
