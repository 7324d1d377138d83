"""Write docs/reference/performance.md from results/: every number and picture comes from a file there.

    python -m benchmarks.report

Run it after results change; a test fails if the page is out of date.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from iwm_fast.benchmarks.parts.report_sections import SECTIONS, counted
from iwm_fast.programs import run_program

__all__ = ["RESULTS", "checksum", "page", "pictures", "write"]

_ROOT = Path(__file__).resolve().parent
RESULTS = _ROOT / "results"
_HEAD = """# Performance

Written by `python -m benchmarks.report` from the files in [benchmarks/results](../../benchmarks/results), which hold
every repeat. How to measure and how to read:
[benchmark and profile](../guides/benchmark_and_profile.md).
"""


def _documents(results: Path) -> dict[str, dict[str, Any]]:
    """Return the results of kinds that have a section, by file name."""
    found = {}
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema") in SECTIONS:
            found[path.name] = document
    return found


def _made_with(file: str, document: Mapping[str, Any]) -> str:
    made = document["environment"]
    gpus = ", ".join(gpu["name"] for gpu in made["gpus"]) or "no GPU"
    return (
        f"[{file}](../../benchmarks/results/{file}): {made['cpu']}, {made['cores']} cores, {gpus}; "
        f"torch {made['packages']['torch']}, commit {(made['commit'] or 'unknown')[:12]}."
    )


def page(results: Path = RESULTS) -> str:
    """Return the page as Markdown."""
    lines = [_HEAD]
    drawn = pictures(results)
    for kind, (title, section) in SECTIONS.items():
        for file, document in _documents(results).items():
            if document["schema"] != kind:
                continue
            lines += [f"## {title}", "", _made_with(file, document), "", *section(document), ""]
            picture = f"{file.removesuffix('.json')}.svg"
            if picture in drawn:
                lines += [f"![{title}](performance/{picture})", ""]
    return "\n".join(lines).rstrip() + "\n"


def pictures(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the documents that have a picture, by the picture's file name."""
    return {
        f"{file.removesuffix('.json')}.svg": document
        for file, document in _documents(results).items()
        if document["schema"] == "iwm-fast-peers/1" or "lines" in document
    }


def checksum(file: Path) -> str:
    """Return a result's SHA-256, which its picture carries."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _draw(document: Mapping[str, Any], picture: Path, source: str) -> None:
    with plt.rc_context({"svg.hashsalt": "iwm-fast", "svg.fonttype": "none"}):
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        if document["schema"] == "iwm-fast-peers/1":
            rows = counted(document)
            names = [row["name"] for row in rows]
            values = [1 / row["operations_ratio"] for row in rows]
            axis.barh([n + 0.2 for n in range(len(names))], values, 0.4, label="FLOPs")
            timed = [(n, row) for n, row in enumerate(rows) if row["speed_ratio"] is not None]
            axis.barh([n - 0.2 for n, _ in timed], [row["speed_ratio"] for _, row in timed], 0.4, label="time")
            axis.axvline(1, color="black", lw=1)
            axis.set_yticks(range(len(names)), names, fontsize=7)
            axis.set_xlabel("how many times more of it the baseline needs (above 1: iwm-fast needs less)")
            axis.legend(fontsize=8)
        else:
            rows = [row for row in document["rows"] if "memory_bytes" in row]
            axis.plot([r["images"] for r in rows], [r["median_s"] for r in rows], "o", label="measured")
            line = document.get("lines", {}).get("seconds")
            if line:
                # By many points: on logarithmic axes a line with an intercept is a curve.
                sizes = np.geomspace(rows[0]["images"], rows[-1]["images"])
                axis.plot(
                    sizes, line["intercept"] + line["slope"] * sizes, lw=1, label="fit: intercept + slope × images"
                )
            axis.set(xlabel="images", ylabel="seconds per step", xscale="log", yscale="log")
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        figure.savefig(picture, metadata={"Date": None, "Source": source})
        plt.close(figure)


def write(results: Path = RESULTS, docs: Path = _ROOT.parent / "docs" / "reference") -> None:
    """Write the page and its pictures."""
    (docs / "performance").mkdir(parents=True, exist_ok=True)
    for name, document in pictures(results).items():
        _draw(document, docs / "performance" / name, checksum(results / name.replace(".svg", ".json")))
    (docs / "performance.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.report", write))
