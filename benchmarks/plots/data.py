"""Plot a result of benchmarks.data, and print its tables.

    python -m benchmarks.plots.data benchmarks/results/FILE.json docs/PICTURE.png

Left: images/s of each implementation, with p20 and p80 of the repeats. Right: milliseconds of one core per image by
stage, from the decoder's floor upwards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iwm_fast.benchmarks.plots import result_and_picture, save
from iwm_fast.programs import run_program

__all__ = ["draw", "table"]


def table(document: dict[str, Any]) -> str:
    """Return Markdown: the implementations, then the stages."""
    ratios = {(ratio["against"], ratio["cores"]): ratio["p50"] for ratio in document["ratios"]}
    lines = ["| implementation | cores | images/s (p20 – p80) | by | iwm-fast is |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        ratio = ratios.get((row["contender"], row["cores"]))
        lines.append(
            f"| {row['contender']} | {row['cores']} | {row['p50']:.0f} ({row['p20']:.0f} – {row['p80']:.0f}) "
            f"| {row['by']} | {'' if ratio is None else f'{ratio:.2f} ×'} |"
        )
    floor = next(stage["p50"] for stage in document["stages"] if "floor" in stage["stage"])
    lines += [
        "",
        "| stage, cumulative | ms of one core per image (p20 – p80) | × floor |",
        "|---|---|---|",
    ]
    for stage in document["stages"]:
        low, middle, high = (1e3 * stage[key] for key in ("p20", "p50", "p80"))
        lines.append(f"| {stage['stage']} | {middle:.3f} ({low:.3f} – {high:.3f}) | {stage['p50'] / floor:.2f} |")
    return "\n".join(lines)


def draw(document: dict[str, Any], picture: Path) -> None:
    """Plot a bar per implementation and number of cores, and a bar per stage."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    cores = list(dict.fromkeys(row["cores"] for row in document["rows"]))
    names = list(dict.fromkeys(row["contender"] for row in document["rows"]))
    width = 0.8 / len(cores)
    for place, count in enumerate(cores):
        rows = [row for row in document["rows"] if row["cores"] == count]
        middle = np.array([row["p50"] for row in rows])
        error = [middle - [row["p20"] for row in rows], np.array([row["p80"] for row in rows]) - middle]
        where = np.array([names.index(row["contender"]) for row in rows]) + place * width
        label = f"{count} core{'s' if count > 1 else ''}, {'CPU' if rows[0]['by'] == 'cpu' else 'wall'} time"
        left.bar(where, middle, width, yerr=error, capsize=3, label=label)
    left.set_xticks(np.arange(len(names)) + width * (len(cores) - 1) / 2, [name.replace(" ", "\n") for name in names])
    left.set(ylabel="images/s", title=f"two views at {document['job']['size']}², {document['job']['device']}")
    left.legend(fontsize=8)
    stages = document["stages"]
    right.barh([stage["stage"] for stage in stages], [1e3 * stage["p50"] for stage in stages], color="C2")
    right.invert_yaxis()
    right.set(xlabel="ms of one core per image", title="each stage with those before it")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, picture)
    plt.close(figure)


def main() -> None:
    """Command line."""
    document, picture = result_and_picture(__doc__)
    print(table(document))
    draw(document, picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.data", main))
