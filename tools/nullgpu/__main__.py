"""The command line: ``python -m tools.nullgpu setup|build|graphs|matrix|step|baseline|run …``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tools.nullgpu
from tools.nullgpu.build import build, setup
from tools.nullgpu.place import run

PRESETS = ("gpu-small", "gpu-base", "gpu-large")
# Stage 0 in bf16 refuses recomputation, which gpu-large ships with.
STAGES = (("zero.stage=0", "train.activation_checkpointing=false"), ("zero.stage=1",), ("zero.stage=2",))


def baseline(words: list[str]) -> int:
    """Count the steps of every preset at stages 0 to 2 and write ``OUT/nullgpu_PRESET.json``, a row for each stage."""
    parser = argparse.ArgumentParser(prog="python -m tools.nullgpu baseline", description=baseline.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    args = parser.parse_args(words)
    for preset in args.presets:
        rows: list[dict[str, Any]] = []
        for overrides in STAGES:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                code = run(["-m", "tools.nullgpu.step", preset, *overrides, "--json", file.name])
                if code:
                    return code
                rows.append(json.loads(Path(file.name).read_text()))
        found = {"schema": "iwm-fast-nullgpu/1", "environment": rows[0]["environment"], "rows": []}
        found["rows"] = [{key: value for key, value in row.items() if key != "environment"} for row in rows]
        (args.out / f"nullgpu_{preset.replace('-', '_')}.json").write_text(json.dumps(found) + "\n")
    return 0


def main(words: list[str]) -> int:
    """Run a command; its exit code."""
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command == "setup":
        return setup()
    if command == "build":
        print(build())
        return 0
    if command in ("graphs", "matrix", "step"):
        return run(["-m", f"tools.nullgpu.{command}", *rest])
    if command == "baseline":
        return baseline(rest)
    if command == "run":
        return run(rest)
    print(tools.nullgpu.__doc__)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FileNotFoundError as error:
        sys.exit(f"nullgpu: {error}")
