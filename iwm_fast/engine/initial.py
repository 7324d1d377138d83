"""The weights that a new run starts from: of the encoder and its EMA (``model.init``), of the predictor
(``model.init_predictor``) and of a frozen target (``model.target_init``).

The first rank reads the files, before anything is written, and fills its model; the others get its weights. A resumed
run reads none of them. ``RUN/initial_weights.json`` records what was loaded, and how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwm_fast.atomic_files import write_whole_text
from iwm_fast.config import ModelConfig
from iwm_fast.engine.checkpoint.paths import named
from iwm_fast.engine.checkpoint.shard_file import file_sum
from iwm_fast.engine.distributed.ranks import Ranks, decide
from iwm_fast.engine.ema import TARGET
from iwm_fast.engine.own_weights import OwnWeights, is_own, read_own
from iwm_fast.errors import UserError, because
from iwm_fast.families import Contents, Fitted, fit_encoder, predictor_of, read_weights, recognise, summary
from iwm_fast.families.converted import PredictorWeights
from iwm_fast.families.fit import value_text
from iwm_fast.models.iwm import IWM

__all__ = ["INITIAL_SCHEMA", "InitialWeights", "Started", "adopt_record", "write_record"]

INITIAL_SCHEMA = "iwm-fast-initial-weights/1"


@dataclass(frozen=True)
class Started:
    """What a run started from. record: of the file. lines: for the terminal. target: the EMA's start, fp32, by name; {}
    where it starts as the encoder.
    """

    record: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    target: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Predictor:
    weights: PredictorWeights
    kind: str
    family: str
    left_out: tuple[str, ...]


class InitialWeights:
    """The weights of a configuration's model. All ranks make one; the first opens it."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._encoders: dict[str, Fitted] = {}
        self._predictor: _Predictor | None = None
        self._read: dict[str, OwnWeights | Contents] = {}

    @property
    def given(self) -> bool:
        """Whether there are any."""
        config = self._config
        return not config.init is config.init_predictor is config.target_init is None

    def open(self) -> None:
        """Open the files and compare them with the configuration; reads little of them. Raises UserError where one is
        missing, damaged, of no known family, or does not fit.
        """
        config = self._config
        for key, architecture in (("init", config.architecture), ("target_init", config.target_architecture)):
            place = getattr(config, key)
            if place is None:
                continue
            with _named(key):
                source = self._source(place)
                frozen = key == "target_init"
                if isinstance(source, OwnWeights):
                    found = source.target if frozen or config.freeze_encoder else source.encoder
                else:
                    found = recognise(source)
                self._encoders[key] = fit_encoder(place, found, architecture, config.init_pixels, frozen=frozen)
        if config.init_predictor is not None:
            with _named("init_predictor"):
                self._predictor = self._opened_predictor(config.init_predictor)

    def fill(self, model: IWM, ranks: Ranks) -> Started:
        """Fill the model; all ranks call it. Raises UserError on every rank where a tensor has numbers that are not
        finite, or cannot be read.
        """
        if not self.given:
            return Started()
        record, lines = decide(ranks, lambda: self._filled(model))
        self._encoders, self._predictor, self._read = {}, None, {}  # of some files the tensors are in memory
        if ranks.world > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, 0)
        own = self._config.target == "ema" and bool(record.get("init", {}).get("target_encoder"))
        target = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if own and name.startswith(TARGET)
        }
        return Started(record, tuple(lines), target)

    def _filled(self, model: IWM) -> tuple[dict[str, Any], list[str]]:
        """Fill the first rank's model."""
        config = self._config
        record: dict[str, Any] = {"schema": INITIAL_SCHEMA}
        lines = []
        for key, fitted in self._encoders.items():
            place = str(getattr(config, key))
            own_target = fitted.target is not None
            with _named(key):
                if key == "target_init":
                    assert model.target_encoder is not None
                    _copy(place, model.target_encoder, fitted.target or fitted.encoder)
                else:
                    chosen = fitted.target if config.freeze_encoder else None
                    _copy(place, model.encoder, chosen or fitted.encoder)
                    if config.target == "ema" and model.target_encoder is not None:
                        _copy(place, model.target_encoder, fitted.target or model.encoder.state_dict())
                record[key] = self._files(place) | fitted.record | {"target_encoder": own_target}
            clauses = [fitted.record["family"], *fitted.said]
            if own_target and key == "init" and config.target == "ema":
                clauses.append("the EMA starts from its target encoder")
            lines.append(f"model.{key}: {place}: {'; '.join(clauses)}")
        if self._predictor is not None:
            place = str(config.init_predictor)
            with _named("init_predictor"):
                about, line = _fill_predictor(place, model, self._predictor)
                record["init_predictor"] = self._files(place) | about
            lines.append(f"model.init_predictor: {place}: {line}")
        return record, lines

    def _source(self, place: str) -> OwnWeights | Contents:
        """What a path names, opened once."""
        if place not in self._read:
            path = Path(place)
            self._read[place] = read_own(path) if path.exists() and is_own(path) else read_weights(path)
        return self._read[place]

    def _files(self, place: str) -> dict[str, Any]:
        try:
            files = {path.name: file_sum(path) for path in self._read[place].files}
        except OSError as error:
            raise UserError(f"{place}: cannot be read ({because(error)})") from error
        return {"path": place, "files": files}

    def _opened_predictor(self, place: str) -> _Predictor:
        source, own = self._source(place), self._config.predictor
        if isinstance(source, OwnWeights):
            found = _Predictor(source.predictor, source.predictor_kind, source.encoder.family, ())
        else:
            of_file = predictor_of(source)
            if of_file is None:
                raise UserError(f"{place}: has no predictor; name a run, an export, or a released file of I-JEPA")
            found = _Predictor(of_file[0], "vit", "I-JEPA", of_file[1])
        weights = found.weights
        # I-JEPA's predictor has as many heads as its encoder.
        heads = weights.heads if weights.heads is not None else self._config.encoder_shape.heads
        hidden = round(own.width * own.mlp_ratio)
        wanted = {
            "kind": (found.kind, own.kind),
            "width": (weights.width, own.width),
            "depth": (weights.depth, own.depth),
            "heads": (heads, own.head_count),
            "mlp_ratio": (weights.hidden / weights.width, own.mlp_ratio if hidden != weights.hidden else None),
        }
        wrong = {key: there for key, (there, here) in wanted.items() if here is not None and there != here}
        if found.kind == "mlp":
            wrong.pop("heads", None)
        if wrong:
            key, there = next(iter(wrong.items()))
            text = " ".join(f"model.predictor.{name}={value_text(value)}" for name, value in wrong.items())
            here = value_text(wanted[key][1])
            raise UserError(
                f"{place}: its predictor has {key} {value_text(there)}, and the configuration's {here}: set {text}"
            )
        if weights.encoder_width != self._config.encoder_shape.width:
            raise UserError(
                f"{place}: its predictor reads tokens of width {weights.encoder_width}, and the encoder's have "
                f"{self._config.encoder_shape.width}; choose a predictor that was trained with this encoder"
            )
        return found


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Begin an error with the configuration's key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"model.{key}: {error}") from error


@torch.no_grad()
def _copy(
    place: str, module: nn.Module, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Copy tensors into a module's parameters, all of them or those given."""
    for name, parameter in (parameters or dict(module.named_parameters())).items():
        try:
            tensor = state[name]
        except KeyError as error:
            raise UserError(f"{place}: {name} is missing; the file is of another network") from error
        if tensor.shape != parameter.shape:
            there, here = ("×".join(map(str, one.shape)) for one in (tensor, parameter))
            raise UserError(f"{place}: {name} is {there} there and {here} in the configuration; choose other weights")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{place}: {name} has numbers that are not finite; give other weights")
        parameter.copy_(tensor)


def _fill_predictor(place: str, model: IWM, found: _Predictor) -> tuple[dict[str, Any], str]:
    """Fill the predictor, but for parameters of the conditioning that do not fit; return its record and its line."""
    state = found.weights.tensors
    own = dict(model.predictor.named_parameters())
    kept = [name for name in own if _conditions(name) and (name not in state or state[name].shape != own[name].shape)]
    _copy(place, model.predictor, state, {name: p for name, p in own.items() if name not in kept})
    unused = [*found.left_out, *(name for name in state if name not in own or name in kept)]
    line = f"predictor of {found.family}"
    if kept:
        line += f"; {', '.join(_short(kept))} of the conditioning start as usual, the file has none that fit"
    if unused:
        line += f"; left out: {summary(unused)}"
    return {"family": found.family, "initialised": kept, "left_out": sorted(unused)}, line


def _conditions(name: str) -> bool:
    """Whether a parameter of a predictor is of the conditioning on actions."""
    return name.startswith(("feature.", "sequence.")) or name.endswith("w_action")


def _short(names: list[str]) -> list[str]:
    """Names with the blocks' numbers left out, each once."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+", "blocks.*", name) for name in names))


def write_record(file: Path, started: Started) -> None:
    """Write a new run's record, or remove one that an earlier launch left. Raises UserError."""
    try:
        if started.record:
            write_whole_text(file, json.dumps(started.record, indent=1) + "\n")
        else:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({because(error)})") from error


def adopt_record(checkpoint: Path, file: Path) -> None:
    """Copy the record of the run that a new run resumes from. Raises UserError."""
    source = named(checkpoint).run / file.name
    if file.exists() or not source.exists():
        return
    try:
        write_whole_text(file, source.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({because(error)})") from error
