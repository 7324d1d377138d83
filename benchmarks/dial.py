r"""Train a grid of predictors between invariant and equivariant, evaluate each, tabulate and plot.

    python -m benchmarks.dial --data DIR --out RUNS --json FILE --picture PNG
    python -m benchmarks.dial --from FILE --picture PNG

A grid is a file of configs/ablations (or a path): configuration keys with the values of each. All combinations are
trained, one that several grids contain only once; keys that a grid does not name have the configuration's value. All
variants are evaluated on banks and pairs of one strength, whatever strength they were trained with. Reported: MRR of
the world model, R² of the action regressed from pairs of embeddings, invariance (cosine of a pair, scaled by that of
other images), and linear probe accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

from iwm_fast.benchmarks.plots import save
from iwm_fast.benchmarks.sweep import SCHEMA, interval, table, train_all
from iwm_fast.config.load import find_config, load_config
from iwm_fast.measure.continued import earlier
from iwm_fast.outputs import require_file, require_folder, require_result
from iwm_fast.programs import run_program

GRIDS = Path(__file__).resolve().parent.parent / "configs" / "ablations"
SHOWN = (
    "loss_last",
    "mrr",
    "mrr_cosine",
    "mrr_shuffled",
    "equivariance",
    "r2_brightness",
    "r2_contrast",
    "r2_saturation",
    "r2_hue",
    "invariance",
    "linear",
    "rank_me",
)
# A panel: metric, title, control, and the control's name.
PANELS = (
    ("mrr", "MRR", "mrr_chance", "chance"),
    ("equivariance", "equivariance, R² of the action", "equivariance_untrained", "untrained"),
    ("invariance", "invariance", "invariance_untrained", "untrained"),
    ("linear", "linear probe, accuracy", "linear_untrained", "untrained"),
)
MEASURED = ["--what", "mrr,linear,equivariance"]


def read_grid(name: str) -> list[dict[str, Any]]:
    """Return the combinations of a grid, each key to value."""
    path = Path(name) if Path(name).suffix else GRIDS / f"{name}.yaml"
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [dict(zip(keys, values, strict=True)) for values in product(*keys.values())]


def default_of(config: str, key: str) -> Any:
    """Return the configuration's value of a key."""
    node: Any = load_config(find_config(config)).model_dump(mode="json")
    for part in key.split("."):
        node = node[part]
    return node


def label(changes: dict[str, Any]) -> str:
    """Name the changed keys and values, short enough for a chart."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in changes.items()) or "as configured"


def points(config: str, grids: list[str]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the variants to train, each once, and the names of those that each grid contains."""
    arms: dict[str, dict[str, Any]] = {}
    held: dict[str, list[str]] = {}
    for grid in grids:
        held[Path(grid).stem] = names = []
        for combination in read_grid(grid):
            changes = {k: v for k, v in sorted(combination.items()) if v != default_of(config, k)}
            name = label(changes)
            names.append(name)
            arms[name] = {"name": name, "overrides": [f"{k}={v}" for k, v in changes.items()], "runs": []}
    return list(arms.values()), held


def value(arm: dict[str, Any], name: str) -> float:
    """Return a variant's metric, the mean over its seeds."""
    mean = interval([run["evaluation"][name] for run in arm["runs"]])["mean"]
    assert mean is not None
    return mean


def draw(arms: list[dict[str, Any]], picture: Path) -> None:
    """Plot each seed, and the mean with its 95 % interval: a row per variant, a panel per metric."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 1.2 + 0.38 * len(arms)), sharey=True, layout="constrained")
    for axis, (key, title, control, control_name) in zip(axes, PANELS, strict=True):
        for row, arm in enumerate(arms):
            seeds = [run["evaluation"][key] for run in arm["runs"]]
            found = interval(seeds)
            axis.plot(seeds, [row] * len(seeds), "o", color="C0", ms=4, alpha=0.35)
            axis.errorbar(found["mean"], row, xerr=found["half_width"], fmt="o", color="C0", ms=6, capsize=3)
        axis.axvline(value(arms[0], control), color="gray", ls="--", lw=1)
        axis.set_title(f"{title}\n(dashed: {control_name})", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    axes[0].invert_yaxis()
    save(figure, picture)


def tables(arms: list[dict[str, Any]], held: dict[str, list[str]]) -> str:
    """Return Markdown, one table per grid; variants that are not evaluated yet are left out."""
    done = {arm["name"]: arm for arm in arms if arm["runs"]}
    parts = [f"{grid}\n\n{table([done[n] for n in names if n in done], SHOWN)}" for grid, names in held.items()]
    return "\n\n".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dial.yaml")
    parser.add_argument("--grid", nargs="+", default=["conditioning", "difficulty", "capacity"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, help="write the runs here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--from", dest="measured", type=Path, help="plot and tabulate this result; train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of all variants")
    parser.add_argument("--measure", nargs="+", default=["actions.strength=1"], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if args.picture:
        require_file(args.picture, "--picture")
    if args.measured:
        found = json.loads(args.measured.read_text())
        arms, held = [arm for arm in found["arms"] if arm["runs"]], found["grids"]
    else:
        if not (args.data and args.out and args.json):
            parser.error("give --data, --out and --json to train, or --from FILE to plot a result")
        require_result(args.json)
        require_folder(args.out)
        arms, held = points(args.config, args.grid)
        held = earlier(args.json, SCHEMA).get("grids", {}) | held
        train_all(
            arms,
            config=args.config,
            data=args.data,
            out=args.out,
            seeds=args.seeds,
            common=args.set,
            measure=[*MEASURED, *args.measure],
            json_file=args.json,
            jobs=args.jobs,
            about={"grids": held},
        )
    print(tables(arms, held))
    if args.picture:
        draw(arms, args.picture)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.dial", main))
