"""docs/performance.md from what lies in results/: every number and picture in it comes from a file there.

    python -m benchmarks.report

Run it after results change; a test fails when the page is not what this would write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["RESULTS", "checksum", "page", "peers_summary", "pictures", "write"]

_ROOT = Path(__file__).resolve().parent
RESULTS = _ROOT / "results"
_HEAD = """# Performance

Written by `python -m benchmarks.report` from the files in [benchmarks/results](../benchmarks/results), which hold every
repeat; nothing here is typed by hand. How to measure and how to read: [benchmarking.md](benchmarking.md).
"""


def _documents(results: Path) -> dict[str, dict[str, Any]]:
    """Results of the kinds that have a section here, by file name."""
    found = {}
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema") in _SECTIONS:
            found[path.name] = document
    return found


def _made_with(file: str, document: Mapping[str, Any]) -> str:
    made = document["environment"]
    gpus = ", ".join(gpu["name"] for gpu in made["gpus"]) or "no GPU"
    return (
        f"[{file}](../benchmarks/results/{file}): {made['cpu']}, {made['cores']} cores, {gpus}; "
        f"torch {made['packages']['torch']}, commit {(made['commit'] or 'unknown')[:12]}."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _peers(document: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in document["rows"]:
        low, high = row.get("speed_ratio_interval", (None, None))
        speed = _number(row["speed_ratio"], ".2f") + ("" if low is None else f" ({low:.2f} – {high:.2f})")
        counts = row["operations_per_image"]
        rows.append(
            (
                row["shape"], row["peer"], speed, _number(row.get("cpu_speed_ratio"), ".2f"),
                f"{row['operations_ratio']:.3f}", f"{counts['ours'] / 1e9:.2f}", f"{counts['peer'] / 1e9:.2f}",
                _number(row["memory_ratio"], ".2f"), str(len(row["seconds"]["ours"])) if "seconds" in row else "–",
            )
        )  # fmt: skip
    columns = (
        "shape", "peer", "speed (99 %)", "speed by CPU time", "operations", "ours, GFLOP an image", "peer's",
        "peak memory", "rounds",
    )  # fmt: skip
    during = [row["load_average"] for row in document["rows"] if "load_average" in row]
    loads = [load[when][0] for load in during for when in ("before", "after")]
    busy = f" The machine's load average was {min(loads):.0f} to {max(loads):.0f}." if loads else ""
    return [
        "Speed is the peer's median time over ours (above 1: iwm-fast is faster); operations and memory are ours over",
        "the peer's (below 1: iwm-fast needs less). Equal masks, sides in turn in one process,",
        f"{document['threads']} thread(s) on {document['device']}.{busy}",
        "",
        *_table(columns, rows),
    ]


def peers_summary(document: Mapping[str, Any]) -> list[str]:
    """The short table that README.md has of the same file."""
    rows = []
    for row in document["rows"]:
        low, high = row.get("speed_ratio_interval", (None, None))
        speed = "–" if low is None else f"{row['speed_ratio']:.2f} ({low:.2f} – {high:.2f})"
        ratios = (f"{row['operations_ratio']:.3f}", _number(row["memory_ratio"], ".2f"))
        rows.append((row["shape"], row["peer"], speed, *ratios))
    return _table(("shape", "peer", "speed", "operations", "peak memory"), rows)


def _steps(document: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            row["name"], str(row["images"]), row["precision"], f"{row['median_s'] * 1e3:.1f}",
            f"{row['images_per_s']:.1f}", f"{row['operations_per_image'] / 1e9:.2f}", _number(row["mfu"], ".1%"),
        )
        for row in document["rows"]
    ]  # fmt: skip
    return _table(("step", "images", "precision", "ms", "images/s", "GFLOP an image", "MFU"), rows)


def _kernels(document: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            " ".join(f"{k}={v}" for k, v in row["case"].items() if v), row["contender"], row["passes"],
            f"{row['p50'] * 1e3:.3f}", f"{row['share_of_matmul']:.1%}", f"{row['share_of_copy']:.1%}",
        )
        for row in document["rows"]
        if "p50" in row
    ]  # fmt: skip
    return _table(("case", "contender", "passes", "ms", "of the matrix rate", "of the copy"), rows)


def _scaling(document: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    ranks = [row for row in document["rows"] if "ranks" in row]
    if ranks:
        rows = [
            (
                row["kind"], str(row["ranks"]), str(row["images"]), f"{row['median_s'] * 1e3:.1f}",
                f"{row['efficiency']:.0%}", f"{sum(row['collectives_a_step']['payload_bytes'].values()):.0f}",
                str(sum(row["expected_bytes"].values())), f"{row['collectives_a_step']['seconds'] * 1e3:.1f}",
            )
            for row in ranks
        ]  # fmt: skip
        columns = (
            "scaling",
            "ranks",
            "images",
            "ms",
            "efficiency",
            "bytes counted",
            "by the formula",
            "ms in collectives",
        )
        cores = document["environment"]["cores"]
        lines += [f"Ranks of one thread each on {cores} cores; more ranks than cores share them.", ""]
        lines += [*_table(columns, rows), ""]
    for what, line in document.get("lines", {}).items():
        lines.append(
            f"- {what} of a step by images: {line['intercept']:.4g} + {line['slope']:.4g} an image, residuals "
            f"{', '.join(f'{r:+.1%}' for r in line['residuals'])}"
        )
    return lines


def _activations(document: Mapping[str, Any]) -> list[str]:
    rows, parts = [], []
    for row in document["rows"]:
        mine, theirs, tokens = row["ours"], row["peer"], row["tokens_per_image"]
        fits = [
            f"{fit['ours']} / {fit['peer']} = {_number(fit['ratio'], '.2f')}" for fit in row["largest_batch"].values()
        ]
        rows.append(
            (
                row["name"], f"{tokens['context']} + {tokens['predicted']:.0f}", f"{mine['per_image'] / 1e6:.2f}",
                f"{theirs['per_image'] / 1e6:.2f}", f"{row['kept_ratio']:.3f}", f"{mine['state'] / 1e9:.2f}",
                f"{(theirs['state'] + theirs['rounded_weights']) / 1e9:.2f}", *fits,
            )
        )  # fmt: skip
        sides = {
            "formula": mine["parts_per_image"],
            "counted": mine["counted_parts_per_image"],
            document["peer"]: theirs["parts_per_image"],
        }
        for side, kept in sides.items():
            parts.append((row["name"], side, *(f"{size / 1e6:.3f}" for size in kept.values())))
    first, batches = document["rows"][0], document["batches"]
    columns = (
        "shape", "tokens, context + predicted", "ours, MB an image", "peer's", "ratio", "state, GB: ours", "peer's",
        *(f"largest batch in {size}" for size in first["largest_batch"]),
    )  # fmt: skip
    names = [part.replace("_", " ") for part in first["ours"]["parts_per_image"]]
    sizes = [row["images"] for row in batches["rows"]]
    worst = max(abs(residual) for residual in batches["residuals"])
    return [
        "What autograd keeps from the forward to the backward pass, in bf16, counted on the meta device: ours and",
        f"{document['peer']}'s, both eager, on the peer's masks. State: weights, gradients, moments, moving average,",
        "and the weights that autocast rounds. Not counted: pixels, what the backward pass needs for moments,",
        "workspaces, what the allocator loses; so the batches are upper bounds on both sides.",
        "",
        *_table(columns, rows),
        "",
        "By part, MB an image. The MLPs' hidden is in none of ours: the kernels compute it again.",
        "",
        *_table(("shape", "", *names), parts),
        "",
        f"{batches['config']}, batches of {sizes[0]} to {sizes[-1]} out of the same images with the training's masks:",
        f"{batches['slope'] / 1e6:.3f} MB an image, no size more than {worst:.2%} off the line.",
    ]


_SECTIONS = {
    "iwm-fast-peers/1": ("The step beside others'", _peers),
    "iwm-fast-activations/1": ("What a step keeps", _activations),
    "iwm-fast-bench-step/1": ("The step", _steps),
    "iwm-fast-kernels/1": ("Kernels", _kernels),
    "iwm-fast-bench-scaling/1": ("Scaling", _scaling),
}


def page(results: Path = RESULTS) -> str:
    """The Markdown."""
    lines = [_HEAD]
    drawn = pictures(results)
    for kind, (title, section) in _SECTIONS.items():
        for file, document in _documents(results).items():
            if document["schema"] != kind:
                continue
            lines += [f"## {title}", "", _made_with(file, document), "", *section(document), ""]
            picture = f"{file.removesuffix('.json')}.svg"
            if picture in drawn:
                lines += [f"![{title}](performance/{picture})", ""]
    return "\n".join(lines).rstrip() + "\n"


def pictures(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Documents that have a picture, by the picture's file name."""
    return {
        f"{file.removesuffix('.json')}.svg": document
        for file, document in _documents(results).items()
        if document["schema"] == "iwm-fast-peers/1" or "lines" in document
    }


def checksum(file: Path) -> str:
    """Of a result; a picture carries that of the result that it draws."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _draw(document: Mapping[str, Any], picture: Path, source: str) -> None:
    with plt.rc_context({"svg.hashsalt": "iwm-fast", "svg.fonttype": "none"}):
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        if document["schema"] == "iwm-fast-peers/1":
            names = [row["name"] for row in document["rows"]]
            values = [1 / row["operations_ratio"] for row in document["rows"]]
            axis.barh([n + 0.2 for n in range(len(names))], values, 0.4, label="operations: theirs over ours")
            timed = [(n, row) for n, row in enumerate(document["rows"]) if row["speed_ratio"] is not None]
            axis.barh([n - 0.2 for n, _ in timed], [row["speed_ratio"] for _, row in timed], 0.4, label="speed")
            axis.axvline(1, color="black", lw=1)
            axis.set_yticks(range(len(names)), names, fontsize=7)
            axis.legend(fontsize=8)
        else:
            rows = [row for row in document["rows"] if "memory_bytes" in row]
            axis.plot([r["images"] for r in rows], [r["median_s"] for r in rows], "o", label="seconds")
            line = document.get("lines", {}).get("seconds")
            if line:
                ends = [rows[0]["images"], rows[-1]["images"]]
                axis.plot(ends, [line["intercept"] + line["slope"] * x for x in ends], lw=1, label="the line")
            axis.set(xlabel="images", ylabel="seconds a step", xscale="log", yscale="log")
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        figure.savefig(picture, metadata={"Date": None, "Source": source})
        plt.close(figure)


def write(results: Path = RESULTS, docs: Path = _ROOT.parent / "docs") -> None:
    """Write the page and its pictures."""
    (docs / "performance").mkdir(parents=True, exist_ok=True)
    for name, document in pictures(results).items():
        _draw(document, docs / "performance" / name, checksum(results / name.replace(".svg", ".json")))
    (docs / "performance.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    write()
