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
    """Rows of peers with operations; others say only why nothing of them was measured."""
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
        *_without(document),
    ]


def _without(document: Mapping[str, Any]) -> list[str]:
    left_out = [(row["name"], row["skipped"]) for row in document["rows"] if "skipped" in row]
    lines = [f"- {name} was not timed: {why}" for name, why in [*document.get("missing", {}).items(), *left_out]]
    return ["", *lines] if lines else []


def peers_summary(document: Mapping[str, Any], *, timed: bool = False) -> list[str]:
    """The short table of docs/results/speed.md; with ``timed`` README.md's, of the rows that have a time."""
    rows = []
    for row in counted(document):
        if timed and row["speed_ratio"] is None:
            continue
        low, high = row.get("speed_ratio_interval", (None, None))
        speed = "–" if low is None else f"{row['speed_ratio']:.2f} ({low:.2f} – {high:.2f})"
        ratios = (f"{row['operations_ratio']:.3f}", _number(row["memory_ratio"], ".2f"))
        rows.append((row["shape"], row["peer"], speed, *ratios))
    return _table(("shape", "peer", "speed", "operations", "peak memory"), rows)


def images_of(row: Mapping[str, Any]) -> str:
    """A row's images, and the sources of each where there are several."""
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


def _savings(document: Mapping[str, Any]) -> list[str]:
    rows = document["rows"]
    said = [
        ("as shipped, GFLOP an image", [f"{row['shipped'] / 1e9:.2f}" for row in rows]),
        ("of it the target's forward", [f"{row['target_forward'] / row['shipped']:.1%}" for row in rows]),
    ]
    for name in rows[0]["without"]:
        said += [(name, [f"{row['without'][name] / row['shipped'] - 1:+.1%}" for row in rows])]
    for sources in rows[0]["sources_per_target"]:
        shares = [f"{row['sources_per_target'][sources] / row['shipped'] - 1:+.1%}" for row in rows]
        said += [(f"a source, where a target has {sources}", shares)]
    lines = [
        "Operations where one saving is taken back (the numbers computed stay the same), and of a source where several",
        "share a target (they do not), beside what is shipped.",
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
        f"What those cost that change the numbers: {said_of}, as many steps and sources a step for all {raw}:",
        "",
        *_table(("arm", "MRR", "MRR, cosine", "k-NN", "linear probe", "loss", "RankMe"), cells),
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
        f"Milliseconds, and in brackets over ours (above 1: ours is faster); {measured}.",
        "",
        *_table(("attention", "by", "forward", "with gradients"), rows),
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


SECTIONS = {
    "iwm-fast-peers/1": ("The step beside others'", _peers),
    "iwm-fast-savings/1": ("Operations that are not spent", _savings),
    "iwm-fast-attention/1": ("Attention at the step's own lengths", _attention),
    "iwm-fast-activations/1": ("What a step keeps", _activations),
    "iwm-fast-bench-step/1": ("The step", _steps),
    "iwm-fast-kernels/1": ("Kernels", _kernels),
    "iwm-fast-bench-scaling/1": ("Scaling", _scaling),
}
