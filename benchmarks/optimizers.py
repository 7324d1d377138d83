"""Time one step of Muon: ours, PyTorch's with its AdamW, and DeepSpeed's, on the same weights and gradients, in turn.

    python -m benchmarks.optimizers --json FILE [--config vit_tiny_p4_32.yaml] [--device cuda] [--repeats 20]

Each steps the trainable parameters of CONFIG's model with random gradients, matrices by Muon in bf16 and the rest by
AdamW, and takes the gradients' global norm, as every training does. One process; messages between ranks are not
measured. Each matrix's first update must point where ours does, or nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.actions.external import action_dim
from iwm_fast.config import load_config
from iwm_fast.config.load import find_config
from iwm_fast.cost.muon import is_orthogonalised
from iwm_fast.engine.muon import FiniteMuon
from iwm_fast.engine.optimizer import parameter_groups
from iwm_fast.measure.device import only_rank
from iwm_fast.measure.stats import ratio_of
from iwm_fast.measure.timing import clocked
from iwm_fast.models.iwm import IWM
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import write_result

__all__ = ["CONTENDERS", "main", "measure_optimizers"]

_RATE, _DECAY, _BETAS = 1e-3, 0.04, (0.9, 0.999)
_AGREE = 0.98  # cosine of two updates: each rounds to bf16 or fp16 between its matmuls, in another order
_WARM_UP = 3
Step = Callable[[], object]


def _ours(model: nn.Module) -> Step:
    groups = parameter_groups(model)
    groups[0]["weight_decay"] = _DECAY
    return FiniteMuon(groups, working=torch.bfloat16, lr=_RATE, betas=_BETAS, fused=True).step


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Muon's matrices, what else decays, the rest."""
    decayed, plain = (group["params"] for group in parameter_groups(model))
    muons = [is_orthogonalised(p.shape, decayed=True) for p in decayed]
    matrices, others = ([p for p, own in zip(decayed, muons, strict=True) if own is kind] for kind in (True, False))
    return matrices, others, plain


def _adamw(others: Sequence[nn.Parameter], plain: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    groups = [{"params": list(others), "weight_decay": _DECAY}, {"params": list(plain), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _with_norm(model: nn.Module, *steps: Step) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        for own in steps:
            own()

    return step


def _pytorch(model: nn.Module) -> Step:
    matrices, *rest = _split(model)
    muon = torch.optim.Muon(matrices, lr=_RATE, weight_decay=_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(_adamw(*rest), lr=_RATE, betas=_BETAS, fused=True)
    return _with_norm(model, muon.step, adamw.step)


def _deepspeed(model: nn.Module) -> Step:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    matrices, *rest = _split(model)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": _RATE, "momentum": 0.95, "weight_decay": _DECAY, "use_muon": True}
    ]
    options = {"lr": _RATE, "betas": _BETAS, "fused": True}
    groups += [group | {"lr": _RATE, "betas": _BETAS, "eps": 1e-8, "use_muon": False} for group in _adamw(*rest)]
    muon = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=options)
    return _with_norm(model, muon.step)


CONTENDERS: dict[str, Callable[[nn.Module], Step]] = {"iwm-fast": _ours, "pytorch": _pytorch, "deepspeed": _deepspeed}
_VERSIONS = {"iwm-fast": "iwm-fast", "pytorch": "torch", "deepspeed": "deepspeed"}


def measure_optimizers(config: str, overrides: Sequence[str], device: torch.device, repeats: int) -> dict[str, Any]:
    """Return seconds of each step by contender, ratios of medians over ours, and the lowest cosine of an update with
    ours.

    Raise RuntimeError if an update points elsewhere.
    """
    found = load_config(find_config(config), list(overrides))
    models: dict[str, IWM] = {}
    for name in CONTENDERS:
        torch.manual_seed(0)
        models[name] = IWM(found.model, action_dim(found.actions)).to(device)
    steps = {name: make(models[name]) for name, make in CONTENDERS.items()}
    before = {key: p.detach().clone() for key, p in models["iwm-fast"].named_parameters() if p.requires_grad}
    taken: dict[str, list[Any]] = {name: [] for name in CONTENDERS}
    agree: dict[str, float] = {}
    for i in range(_WARM_UP + repeats):
        for name, model in models.items():
            torch.manual_seed(1 + i)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn_like(parameter)
            taken[name].append(clocked(steps[name], device))
        if i == 0:
            updates = {name: _updates(model, before) for name, model in models.items()}
            agree = {name: _lowest_cosine(own, updates["iwm-fast"]) for name, own in updates.items()}
            if min(agree.values()) < _AGREE:
                raise RuntimeError(f"updates point elsewhere (cosines {agree}): not timed")
    seconds = {name: [one.seconds for one in own[_WARM_UP:]] for name, own in taken.items()}
    ratios = {name: ratio_of(own, seconds["iwm-fast"], paired=True) for name, own in seconds.items()}
    return {
        "config": config,
        "overrides": list(overrides),
        "parameters": sum(w.numel() for w in before.values()),
        "versions": {name: version(package) for name, package in _VERSIONS.items()},
        "cosine": agree,
        "seconds": seconds,
        "cpu_seconds": {name: [one.cpu_seconds for one in own[_WARM_UP:]] for name, own in taken.items()},
        "ratio": {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in ratios.items()},
    }


def _updates(model: nn.Module, before: dict[str, Tensor]) -> list[Tensor]:
    weights = dict(model.named_parameters())
    return [(weights[key].detach() - old).flatten() for key, old in before.items() if old.ndim == 2]


def _lowest_cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override keys of CONFIG")
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    parser.add_argument("--config", nargs="+", default=["vit_tiny_p4_32.yaml"])
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each")
    parser.add_argument("--threads", type=int, help="torch threads, on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    args = parser.parse_args()
    require_result(args.json)
    ranks = only_rank(args.device, args.threads)
    rows: list[dict[str, Any]] = []
    for config in args.config:
        row = measure_optimizers(config, args.overrides, ranks.device, args.repeats)
        rows.append(row)
        body = {"device": ranks.device.type, "threads": torch.get_num_threads(), "rows": rows}
        write_result(args.json, "bench-optimizers", body)
        for name, own in row["seconds"].items():
            ratio, shown = row["ratio"][name], f"{1e3 * median(own):.1f} ms"
            print(f"{config} {name} {row['versions'][name]}: {shown}, {ratio['value']:.2f} of ours", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.optimizers", main))
