"""The model card beside an export: configuration, data, results with their controls, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from iwm_fast.config.encoders import EncoderArchitecture
from iwm_fast.data.sources.s3 import is_address
from iwm_fast.engine.provenance import recorded_launch
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.environment import environment
from iwm_fast.eval.measurements import merged, read
from iwm_fast.eval.report.report import read_metrics
from iwm_fast.eval.report.terminal import result_rows
from iwm_fast.eval.report.verdicts import verdict_lines
from iwm_fast.export.described import Trained
from iwm_fast.export.loading import loading_code, reading_note
from iwm_fast.file_names import printable, valid_unicode

__all__ = ["write_card"]

_LISTED = 4
_LIBRARIES = {"iwm": "iwm-fast", "timm": "timm", "transformers": "transformers", "pt2": "pytorch", "onnx": "onnx"}


def write_card(trained: Trained, folder: Path, form: str) -> None:
    """Write README.md into a folder that an export in the format ``form`` is in."""
    text = (
        _templates()
        .get_template("README.md")
        .render(
            library=_LIBRARIES[form],
            title=printable(trained.run.resolve().name),
            environment=environment(),
            checkpoint=trained.checkpoint,
            step=trained.step,
            files=_files(folder),
            code=loading_code(trained, form),
            reading=reading_note(form),
            evaluated=trained.evaluated,
            configuration=_configuration(trained),
            actions=trained.space.names,
            external=trained.config.actions.is_external,
            data=_data(trained),
            results=_results(trained),
            image=trained.config.model.image,
            initial=trained.initial_weights() is not None,
        )
    )
    (folder / "README.md").write_text(valid_unicode(text.rstrip() + "\n"), encoding="utf-8")


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("iwm_fast.export"),
        autoescape=False,  # noqa: S701  (Markdown, of values that the program itself makes)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _files(folder: Path) -> list[tuple[str, str]]:
    """Return each file with what it holds, in the order of their names."""
    told: dict[str, str] = {}
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told |= {name: f"{entry['holds']} ({entry['layout']})" for name, entry in described.get("files", {}).items()}
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "README.md":
            found.append((name, told.get(name) or _usual(name)))
    return found


def _usual(name: str) -> str:
    """Return what a file holds by its name alone."""
    place, _, file = name.rpartition("/")
    whose = {
        "predictor": "of the predictor, the world model",
        "context_encoder": "of the context encoder",
        "target_encoder": "of the target encoder",
    }.get(place, "")
    if file.endswith(".data"):
        return f"weights of {file.removesuffix('.data')}"
    kinds = {"config.json": "configuration", "model.safetensors": "weights", "preprocessor_config.json": "pixels"}
    return " ".join(filter(None, (kinds.get(file, "code" if file.endswith(".py") else "file"), whose)))


def _configuration(trained: Trained) -> list[tuple[str, str]]:
    model, predictor = trained.config.model, trained.config.model.predictor
    rows = [("encoder", _network(model.architecture))]
    network = f"{predictor.kind}, {predictor.depth} blocks, width {predictor.width}, {predictor.head_count} heads"
    if model.target_architecture != model.architecture:
        rows.append(("target encoder", _network(model.target_architecture)))
    rows += [
        (
            "images",
            f"{model.image} × {model.image} pixels, patches of {model.patch} × {model.patch}: {model.grid**2} tokens",
        ),
        ("pixels", "RGB in [0, 1], minus ImageNet's mean, over its std"),
        (
            "predictor",
            f"{network}, conditioning {predictor.conditioning}, {_millions(trained.model.predictor)} weights",
        ),
        ("target", {"ema": "EMA of the encoder", "shared": "the encoder itself"}.get(model.target, model.target)),
        ("normalised target", "yes, over the width, without weights" if model.normalize_target else "no"),
        ("regularizer", model.regularizer.kind),
        ("precision in training", trained.config.train.precision),
        ("global batch", f"{trained.config.train.global_batch:,} images"),
        ("weights here", "float32"),
    ]
    return rows + _initial(trained.initial_weights() or {})


def _initial(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each file of weights that the run started from: its family, name and sums, what was changed."""
    rows = []
    for key, name in {"init": "encoder", "target_init": "target", "init_predictor": "predictor"}.items():
        about = record.get(key)
        if not isinstance(about, dict):
            continue
        said = [str(about.get("family", "")), f"`{about.get('path', '')}`"]
        said += [f"`{file}` sha256 {sums['sha256'][:16]}…" for file, sums in about.get("files", {}).items()]
        lists = {key: value for key, value in about.items() if isinstance(value, list) and value}
        said += [f"{key.replace('_', ' ')}: {_shortened(value)}" for key, value in lists.items()]
        rows.append((f"{name}'s initial weights", printable("; ".join(filter(None, said))).replace("|", "\\|")))
    return rows


def _shortened(value: Sequence[Any]) -> str:
    more = f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
    return ", ".join(map(str, value[:_LISTED])) + more


def _network(own: EncoderArchitecture) -> str:
    shape = own.shape
    prefix = {0: "no prefix tokens", 1: "a class token"}.get(
        own.prefix_tokens, f"a class token and {own.prefix_tokens - 1} registers"
    )
    positions = {"sincos": "fixed sin-cos positions", "learned": "learned positions", "rope": "rotary positions (rope)"}
    return (
        f"vision transformer, {shape.depth} blocks, width {shape.width}, {shape.heads} heads, MLP of "
        f"{round(shape.width * shape.mlp_ratio)}, {prefix}, {positions[own.positions]}, eps {own.norm_eps:g}"
    )


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def _data(trained: Trained) -> str:
    run = RunDirectory(trained.run)
    images = recorded_launch(run.environment_file).get("images")
    records = [r for r in read_metrics(run.metrics_file) if r.get("step", 0) <= trained.step]
    seen = next((r["samples_seen"] for r in reversed(records) if isinstance(r.get("samples_seen"), int)), None)
    what = "triplets" if trained.config.actions.is_external else "images"
    said = f"{images:,} {what}" if isinstance(images, int) else f"An unrecorded number of {what}"
    return f"{said}, {seen:,} seen in training." if seen is not None else f"{said}; the number seen is not recorded."


def _results(trained: Trained) -> list[dict[str, Any]]:
    """Return the results of this checkpoint by data: of RUN/results, else of RUN/evaluation.json."""
    own = [one for one in read(trained.run) if one.weights == trained.weights]
    found = [_shown(place, merged([m for m in own if m.data == place]), trained.step) for place in _places(own)]
    if found:
        return found
    try:
        document = json.loads((trained.run / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or none of an evaluation
        return []
    if not isinstance(document, dict) or document.get("weights") != trained.weights:
        return []
    splits = document.get("splits")
    place = splits.get("test", "") if isinstance(splits, dict) else ""
    return [_shown(str(place), document, trained.step)] if result_rows(document) else []


def _places(own: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(one.data for one in own))


def _shown(place: str, results: dict[str, Any], step: int) -> dict[str, Any]:
    name = place if is_address(place) else Path(place).name or "the given images"
    rows = [[cell.replace("|", "\\|") for cell in row] for row in result_rows(results)]
    return {"data": printable(name), "step": step, "rows": rows, "lines": verdict_lines(results)}
