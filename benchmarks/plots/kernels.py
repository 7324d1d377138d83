"""Plot the roofline of a result of benchmarks.kernels, and print its table.

    python -m benchmarks.plots.kernels benchmarks/results/FILE.json docs/PICTURE.png

FLOP/s over FLOP per byte (of the minimum bytes moved), both on logarithmic axes, under the limits that the same run
measured.
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


def table(document: dict[str, Any]) -> str:
    """Return Markdown, a line per row: time and speedup over eager in the same case and pass, or the reason why not."""
    timed = [row for row in document["rows"] if "p50" in row]
    eager = {(str(r["case"]), r["passes"]): r["p50"] for r in timed if r["contender"] == "eager"}
    lines = ["| operation | N | D | H | A | pass | implementation | ms (p20 – p80) | × eager | of matmul | of copy |"]
    lines.append("|---" * 11 + "|")
    for row in document["rows"]:
        if "skipped" in row:
            case, who = row["case"], f"{row['contender']} {row['version'] or '–'}"
            sizes = " | ".join(str(case[key]) for key in ("operation", "tokens", "width", "hidden", "actions"))
            lines.append(f"| {sizes} | – | {who} | not timed: {row['skipped']} | – | – | – |")
            continue
        case, (low, middle, high) = row["case"], (1e3 * row[key] for key in ("p20", "p50", "p80"))
        base = eager.get((str(case), row["passes"]))
        ratio = "–" if base is None else f"{base / row['p50']:.2f}"
        lines.append(
            f"| {case['operation']} | {case['tokens']} | {case['width']} | {case['hidden']} | {case['actions']} "
            f"| {row['passes']} | {row['contender']} {row['version']} | {middle:.3f} ({low:.3f} – {high:.3f}) "
            f"| {ratio} | {row['share_of_matmul']:.1%} | {row['share_of_copy']:.1%} |"
        )
    return "\n".join(lines)


def _name(case: dict[str, Any]) -> str:
    """Name a case in the legend: operation, tokens × width (→ hidden), number of action components."""
    hidden = f" → {case['hidden']}" if case["hidden"] else ""
    actions = f", action of {case['actions']}" if case["actions"] else ""
    return f"{case['operation']} {case['tokens']} × {case['width']}{hidden}{actions}"


def draw(document: dict[str, Any], picture: Path) -> None:
    """Plot the roofline: a colour per case, a marker per implementation, filled for forward, hollow for both passes."""
    limits = document["ceilings"]
    top, slope = limits["matmul_flops_per_s"], limits["copy_bytes_per_s"]
    timed = [row for row in document["rows"] if "p50" in row]
    cases = list(dict.fromkeys(_name(row["case"]) for row in timed))
    contenders = list(dict.fromkeys(row["contender"] for row in timed))
    shapes = dict(zip(contenders, "os^Dv<>pPXh*", strict=False))
    figure, axis = plt.subplots(figsize=(11, 5), layout="constrained")
    reach = np.geomspace(0.5, 4000, 200)
    axis.plot(reach, np.minimum(top, slope * reach), color="black", lw=1, label="measured limits")
    for row in timed:
        colour = f"C{cases.index(_name(row['case']))}"
        axis.scatter(
            row["flops"] / row["bytes"],
            row["flops"] / row["p50"],
            edgecolors=colour,
            facecolors=colour if row["passes"] == "forward" else "none",
            marker=shapes[row["contender"]],
            s=36,
            zorder=3,
        )
    for number, case in enumerate(cases):
        axis.plot([], [], "s", color=f"C{number}", label=case)
    for name in contenders:
        axis.plot([], [], shapes[name], color="black", label=name)
    axis.plot([], [], "o", color="black", markerfacecolor="none", label="hollow: forward + backward")
    axis.set(
        xscale="log", yscale="log", xlabel="FLOP per byte moved at least", ylabel="FLOP/s", title=document["device"]
    )
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center", fontsize=8)
    save(figure, picture)


def main() -> None:
    """Command line."""
    document, picture = result_and_picture(__doc__)
    print(table(document))
    draw(document, picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.plots.kernels", main))
