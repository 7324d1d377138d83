"""The sections of docs/reference/performance.md: each kind of result as lines of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SECTIONS", "counted", "peers_summary"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def counted(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of baselines that have FLOPs; the others only say why nothing was measured."""
    return [row for row in document["rows"] if "operations_ratio" in row]


def _peers(document: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in counted(document):
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
        "shape", "baseline", "speed (99 %)", "speed by CPU time", "FLOPs", "iwm-fast, GFLOP/image",
        "baseline, GFLOP/image", "peak memory", "rounds",
    )  # fmt: skip
    during = [row["load_average"] for row in document["rows"] if "load_average" in row]
    loads = [load[when][0] for load in during for when in ("before", "after")]
    busy = f" The machine's load average was {min(loads):.0f} to {max(loads):.0f}." if loads else ""
    return [
        "Speed is the baseline's median time over iwm-fast's (above 1: iwm-fast is faster). FLOPs and peak memory are",
        "iwm-fast's over the baseline's (below 1: iwm-fast needs less). Equal masks, in turn in one process,",
        f"{document['threads']} thread(s) on {document['device']}.{busy}",
        "",
        *_table(columns, rows),
        *_without(document),
    ]


def _without(document: Mapping[str, Any]) -> list[str]:
    left_out = [(row["name"], row["skipped"]) for row in document["rows"] if "skipped" in row]
    lines = [f"- {name} was not timed: {why}" for name, why in [*document.get("missing", {}).items(), *left_out]]
    return ["", *lines] if lines else []


def peers_summary(document: Mapping[str, Any], *, timed: bool = False) -> list[str]:
    """Return the short table of docs/results/speed.md; with ``timed``, only the timed rows, as in README.md."""
    rows = []
    for row in counted(document):
        if timed and row["speed_ratio"] is None:
            continue
        low, high = row.get("speed_ratio_interval", (None, None))
        speed = "–" if low is None else f"{row['speed_ratio']:.2f} ({low:.2f} – {high:.2f})"
        ratios = (f"{row['operations_ratio']:.3f}", _number(row["memory_ratio"], ".2f"))
        rows.append((row["shape"], row["peer"], speed, *ratios))
    return _table(("shape", "baseline", "speed", "FLOPs", "peak memory"), rows)


def images_of(row: Mapping[str, Any]) -> str:
    """Return a row's images, with the sources of each if there are several."""
    sources = row.get("sources_per_target", 1)
    return f"{row['images']} × {sources} sources" if sources > 1 else str(row["images"])


def _steps(document: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            row["name"], images_of(row), row["precision"], f"{row['median_s'] * 1e3:.1f}",
            f"{row['images_per_s']:.1f}", f"{row['operations_per_image'] / 1e9:.2f}", _number(row["mfu"], ".1%"),
        )
        for row in document["rows"]
    ]  # fmt: skip
    return _table(("step", "images", "precision", "ms", "images/s", "GFLOP/image", "MFU"), rows)


def _kernels(document: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            " ".join(f"{k}={v}" for k, v in row["case"].items() if v), row["contender"], row["passes"],
            f"{row['p50'] * 1e3:.3f}", f"{row['share_of_matmul']:.1%}", f"{row['share_of_copy']:.1%}",
        )
        for row in document["rows"]
        if "p50" in row
    ]  # fmt: skip
    return _table(("case", "implementation", "passes", "ms", "of matmul rate", "of copy rate"), rows)


def _scaling(document: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    ranks = [row for row in document["rows"] if "ranks" in row]
    if ranks:
        rows = [
            (
                row["kind"], str(row["ranks"]), images_of(row), f"{row['median_s'] * 1e3:.1f}",
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
            "bytes by formula",
            "ms in collectives",
        )
        cores = document["environment"]["cores"]
        lines += [f"Each rank has one thread, on {cores} cores; more ranks than cores share them.", ""]
        lines += [*_table(columns, rows), ""]
    for what, line in document.get("lines", {}).items():
        lines.append(
            f"- {what} per step: {line['intercept']:.4g} + {line['slope']:.4g} per image; residuals "
            f"{', '.join(f'{r:+.1%}' for r in line['residuals'])}"
        )
    return lines


def _savings(document: Mapping[str, Any]) -> list[str]:
    rows = document["rows"]
    said = [
        ("as shipped, GFLOP/image", [f"{row['shipped'] / 1e9:.2f}" for row in rows]),
        ("share of the target's forward", [f"{row['target_forward'] / row['shipped']:.1%}" for row in rows]),
    ]
    for name in rows[0]["without"]:
        said += [(name, [f"{row['without'][name] / row['shipped'] - 1:+.1%}" for row in rows])]
    for sources in rows[0]["sources_per_target"]:
        shares = [f"{row['sources_per_target'][sources] / row['shipped'] - 1:+.1%}" for row in rows]
        said += [(f"per source, {sources} sources per target", shares)]
    lines = [
        "FLOPs without one saving, relative to the step as shipped; the result stays the same. The last rows are FLOPs",
        "per source if several sources share a target, which changes the result.",
        "",
        *_table(("", *(row["config"].removesuffix(".yaml") for row in rows)), [(name, *cells) for name, cells in said]),
    ]
    quality = document.get("quality")
    if quality is None:
        return lines
    figures = ("mrr", "mrr_cosine", "knn", "linear", "loss_last", "rank_me")
    cells = [
        (arm["name"], *(f"{arm['figures'][f]['mean']:.3f} ± {arm['figures'][f]['half_width']:.3f}" for f in figures))
        for arm in quality["arms"]
    ]
    seeds = len(quality["arms"][0]["figures"]["mrr"]["seeds"])
    said_of = f"`{quality['config']}` with `{' '.join(quality['common'])}`, {seeds} seeds, means with 95 % intervals"
    raw = f"([raw](../../benchmarks/results/{quality['file']}))"
    return [
        *lines,
        "",
        f"Accuracy with the savings that change the result: {said_of}, equal steps and sources per step {raw}:",
        "",
        *_table(("variant", "MRR", "MRR, cosine", "k-NN", "linear probe", "loss", "RankMe"), cells),
    ]


def _attention(document: Mapping[str, Any]) -> list[str]:
    cells: dict[tuple[str, str], dict[bool, str]] = {}
    ours = {(r["case"], r["backward"]): r["p50"] for r in document["rows"] if r["contender"] == "iwm-fast"}
    for row in document["rows"]:
        said = row.get("skipped") or f"{row['p50'] * 1e3:.2f} ({row['p50'] / ours[row['case'], row['backward']]:.2f})"
        cells.setdefault((row["case"], row["contender"]), {})[row["backward"]] = said.partition(":")[0]
    rows = [(*names, both[False], both[True]) for names, both in cells.items() if both[False] != "needs a GPU"]
    measured = f"{document['rows'][0]['dtype']}, {document['threads']} thread(s) on {document['device']}"
    return [
        f"Milliseconds, with the ratio to iwm-fast's in brackets (above 1: iwm-fast is faster); {measured}.",
        "",
        *_table(("attention", "implementation", "forward", "forward + backward"), rows),
    ]


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
        "shape", "tokens, context + predicted", "iwm-fast, MB/image", "baseline, MB/image", "ratio",
        "state, GB: iwm-fast", "state, GB: baseline",
        *(f"largest batch in {size}" for size in first["largest_batch"]),
    )  # fmt: skip
    names = [part.replace("_", " ") for part in first["ours"]["parts_per_image"]]
    sizes = [row["images"] for row in batches["rows"]]
    worst = max(abs(residual) for residual in batches["residuals"])
    return [
        f"Saved activations in bf16, counted on the meta device: iwm-fast and the baseline {document['peer']}, both",
        "eager, on the baseline's masks. State: weights, gradients, optimizer moments, EMA, and the weights that",
        "autocast rounds. Not counted: pixels, temporary memory of the backward pass, workspaces, fragmentation. The",
        "largest batch is therefore an upper bound for both.",
        "",
        *_table(columns, rows),
        "",
        "By part, MB per image. iwm-fast never saves the MLPs' hidden activations: the kernels recompute them.",
        "",
        *_table(("shape", "", *names), parts),
        "",
        f"{batches['config']}, batches of {sizes[0]} to {sizes[-1]} of the same images with the training's masks:",
        f"{batches['slope'] / 1e6:.3f} MB per image; the largest residual is {worst:.2%}.",
    ]


SECTIONS = {
    "iwm-fast-peers/1": ("Training step against baselines", _peers),
    "iwm-fast-savings/1": ("FLOPs saved", _savings),
    "iwm-fast-attention/1": ("Packed attention at the step's sequence lengths", _attention),
    "iwm-fast-activations/1": ("Saved activations", _activations),
    "iwm-fast-bench-step/1": ("Training step", _steps),
    "iwm-fast-kernels/1": ("Kernels", _kernels),
    "iwm-fast-bench-scaling/1": ("Scaling", _scaling),
}
