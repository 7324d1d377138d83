"""The gate of the ahead-of-time compiles, in processes of their own: what they read, and that faults fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from iwm_fast.kernels import TRITON_FUNCTIONS
from iwm_fast.kernels.aot import Report

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*words, **environment):
    command = [sys.executable, "-m", "iwm_fast.kernels.aot", *words]
    return subprocess.run(command, cwd=ROOT, env=CLEAN | environment, capture_output=True, text=True, check=False)


def test_every_kernel_of_an_architecture_compiles_without_a_spill(tmp_path):
    page = tmp_path / "page.md"
    files = ("--json", tmp_path / "rows.json", "--keep", tmp_path / "cubins", "--markdown", page)
    done = run("--arch", "sm_90", *map(str, files))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "rows.json").read_text())
    rows = document["rows"]
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "activate_kernel", "assemble_backward_kernel", "assemble_kernel", "average_kernel", "distance_kernel",
        "e4m3_kernel", "fused_mlp_kernel", "hidden_backward_kernel",
        "linear_kernel", "norm_backward_kernel", "norm_kernel", "patchify_kernel", "segment_sum_kernel",
        "weight_grad_kernel",
    }  # fmt: skip
    for row in rows:
        assert {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes"} <= row.keys()
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert row["shared_bytes"] <= 227 * 1024
        assert row["programs"] >= 1
        if row["kernel"] in ("linear_kernel", "weight_grad_kernel", "fused_mlp_kernel", "hidden_backward_kernel"):
            assert row["matrix_instructions"]["wgmma.mma_async"] > 0
    cubins = list((tmp_path / "cubins").glob("*.cubin"))
    assert len(cubins) == len(rows)
    for cubin in cubins:  # what a profiler is told to look for is what the GPU's code is called
        assert re.findall(rb"\.text\.(\w+)", cubin.read_bytes())[0].decode() == cubin.name.partition(".")[0]
    assert kernels == set(TRITON_FUNCTIONS)
    committed = (ROOT / "docs" / "kernels_sm_90.md").read_text()
    if f"Triton {document['triton']}," in committed:  # another version allots other registers
        assert page.read_text() == committed, "docs/kernels_sm_90.md is old: its first lines say how to make it again"


def test_the_interpreter_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "without it" in done.stderr
    assert "Traceback" not in done.stderr


def report(**changes):
    given = {
        "kernel": "linear_kernel", "arch": "sm_80", "shape": "s", "config": {}, "registers": 100, "spill_bytes": 0,
        "shared_bytes": 1000, "programs": 2, "matrix_instructions": {"mma.sync": 8},
    }  # fmt: skip
    return Report(**(given | changes))


def test_faults_are_a_spill_too_much_shared_memory_and_a_product_without_matrix_instructions():
    assert report().fault is None
    assert "spills 8 bytes" in report(spill_bytes=8).fault
    assert "shared memory" in report(shared_bytes=163 * 1024 + 1).fault
    assert report(shared_bytes=200 * 1024, arch="sm_90").fault is None
    assert "no matrix instruction" in report(matrix_instructions={}).fault
    assert report(kernel="norm_kernel", matrix_instructions={}).fault is None
