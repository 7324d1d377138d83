"""Count the kernel launches of a training step by part, or of one call of the conditioned MLP, without a GPU.

    python -m benchmarks.launches CONFIG ... [KEY.PATH=VALUE ...] --json FILE
    python -m benchmarks.launches --mlp N,D,H,A --json FILE

CONFIG: a preset of `iwm-fast bench step`, or a configuration; counts one step on one rank (`step_launches`).
N tokens, D width, H hidden units, A action components (0: no action): counts forward and backward of one call, and its
peak bytes, outputs included and inputs not.

Counted are launches of Triton kernels and those of PyTorch's operators on CUDA (`launch_rules`). Matmuls use the first
candidate of sm_90.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from iwm_fast.benchmarks.cases.presets import PRESETS, preset_config
from iwm_fast.benchmarks.counting.launch_counting import Launched, count_launches
from iwm_fast.benchmarks.parts.report_sections import images_of
from iwm_fast.config import Config
from iwm_fast.config.load import find_config, load_config
from iwm_fast.errors import UserError
from iwm_fast.kernels._mlp import passes
from iwm_fast.kernels._mlp.workspace import limited
from iwm_fast.measure.device import only_rank
from iwm_fast.outputs import require_result
from iwm_fast.programs import run_program
from iwm_fast.results import give_result

__all__ = ["mlp_launches"]

_IMAGES = 512


def mlp_launches(
    tokens: int, width: int, hidden: int, actions: int, workspace: int | None = None
) -> dict[str, Launched]:
    """Count one call in bf16 with LayerNorm and residual, and its backward pass. `workspace`: its limit in bytes."""

    def empty(*shape: int, kind: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    images = min(_IMAGES, tokens)
    action = (empty(images, actions), empty(hidden, actions)) if actions else (None, None)
    bounds = empty(images + 1, kind=torch.int32) if actions else None
    inputs: tuple[Any, ...] = (
        empty(tokens, width), empty(hidden, width), empty(hidden), empty(width, hidden), empty(width),
        *action, bounds, empty(width), empty(width), True, 1e-6, "gelu", limited(workspace),
    )  # fmt: skip
    backward_inputs: tuple[Any, ...] = (empty(tokens, width), *inputs, True)
    return {
        "forward": count_launches(lambda: passes.forward(*inputs)),
        "backward": count_launches(lambda: passes.backward(*backward_inputs)),
    }


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes[:3]) < 1 or sizes[3] < 0:
        raise UserError(f"--mlp {text}: give four integers N,D,H,A: N, D, H at least 1, A at least 0")
    return sizes


def _chosen(words: Sequence[str]) -> list[tuple[str, Config]]:
    """Return the named configurations; overrides apply to all."""
    names = [word for word in words if "=" not in word]
    if not names:
        raise UserError(
            f"{' '.join(words) or 'CONFIG'}: no configuration; name configurations or presets ({', '.join(PRESETS)}), "
            "then KEY.PATH=VALUE, or give --mlp N,D,H,A"
        )
    overrides = tuple(word for word in words if "=" in word)
    return [
        (name, preset_config(name, overrides) if name in PRESETS else load_config(find_config(name), overrides))
        for name in names
    ]


def _count_steps(chosen: Sequence[tuple[str, Config]], destination: str) -> None:
    from iwm_fast.benchmarks.counting.step_launches import step_launches
    from iwm_fast.log_filters import quiet_third_parties

    quiet_third_parties()
    only_rank("cpu", 1)
    found: list[dict[str, Any]] = []
    for name, config in chosen:
        rows = step_launches(config)
        shape = {
            "config": name, "images": config.train.global_batch, "sources_per_target": config.views.sources_per_target,
            "stage": config.zero.stage,
        }  # fmt: skip
        total = sum(row.triton + row.torch for row in rows)
        found.append(shape | {"rows": [asdict(row) for row in rows], "total": total})

    def show() -> None:
        for one in found:
            print(f"{one['config']}, images: {images_of(one)}, stage {one['stage']}")
            print(f"{'part':36}{'Triton':>8}{'PyTorch':>9}")
            for row in one["rows"]:
                print(f"{row['part']:36}{row['triton']:8}{row['torch']:9}")
            print(f"{'total':36}{one['total']:17}")

    give_result(destination, "launches", found[0] if len(found) == 1 else {"configs": found}, show)


def _count_mlp(text: str, destination: str) -> None:
    counts = mlp_launches(*_sizes(text))

    def show() -> None:
        for name, found in counts.items():
            kernels = ", ".join(f"{n} {kernel.removesuffix('_kernel')}" for kernel, n in found.kernels.items())
            total = found.triton + found.torch
            print(f"{name:10}{total:4} launches: {found.triton} Triton ({kernels}), {found.torch} PyTorch")

    give_result(destination, "launches", {"mlp": text} | {name: asdict(found) for name, found in counts.items()}, show)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG", help="presets or configurations, then KEY.PATH=VALUE overrides for all"
    )
    parser.add_argument("--mlp", metavar="N,D,H,A", help="tokens, width, hidden units, action components")
    parser.add_argument("--json", required=True, help="file to write; - for standard output")
    args = parser.parse_intermixed_args(words)
    if args.mlp is not None and args.config:
        raise UserError(f"--mlp {args.mlp}: cannot be given with {args.config[0]}; give one of them")
    require_result(args.json)
    if args.mlp is not None:
        _count_mlp(args.mlp, args.json)
    else:
        _count_steps(_chosen(args.config), args.json)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.launches", main))
