"""Saved activations of a baseline: GPU autocast, a block computed by hand, and the committed file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iwm_fast.benchmarks.activations import compare_shape, count_batches, main
from iwm_fast.benchmarks.adapters.ijepa import Checkout
from iwm_fast.benchmarks.adapters.inputs import Shape
from iwm_fast.benchmarks.cases.presets import preset_config
from iwm_fast.benchmarks.counting.kept_count import KeptCounter
from iwm_fast.cost.activations import activations
from iwm_fast.cost.tokens import tokens_of
from iwm_fast.measure.autocast import CudaAutocast

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "activations_cpu.json"
CHECKOUT = os.environ.get("IWM_FAST_IJEPA")
pytestmark = pytest.mark.usefixtures("torchs_own_linear")


class Products(nn.Module):
    """Operators that autocast treats alike on a CPU and on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 24, 4, 4)
        self.inner, self.outer = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, images):
        x = self.cut(images).flatten(2).transpose(1, 2)
        y = self.outer(F.gelu(self.inner(x)))
        return (x + self.outer(F.gelu(self.inner(y))), y @ y.transpose(1, 2))


def test_matmuls_save_what_they_do_under_torchs_own_autocast():
    found = {}
    for device, autocast in (("cpu", torch.autocast("cpu", torch.bfloat16)), ("meta", CudaAutocast())):
        with torch.device(device):
            model, images = Products(), torch.zeros(2, 3, 16, 16)
        counter = KeptCounter(model)
        with counter.counting(), autocast:
            results = model(images)
        found[device] = (counter.bytes, [result.dtype for result in results])
    assert found["cpu"] == found["meta"]


def test_normalisation_softmax_and_loss_are_in_fp32():
    """From torch's lists for CUDA; a CPU's own autocast leaves the first two in bf16."""
    x = torch.zeros(3, 8, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"), CudaAutocast():
        assert nn.LayerNorm(8)(x).dtype == x.softmax(dim=-1).dtype == F.smooth_l1_loss(x, x).dtype == torch.float32
        assert (F.gelu(x) + x).dtype == torch.bfloat16


@pytest.mark.parametrize("sources", [1, 3])
def test_batches_of_any_size_lie_on_a_line(sources):
    changes = ("train.precision=bf16", "zero.stage=1", f"views.sources_per_target={sources}")
    config = preset_config("cpu-micro", changes)
    found = count_batches(config, sizes=(1, 4, 16))
    assert [len(row["kept_bytes"]) for row in found["rows"]] == [16, 4, 1]
    assert np.abs(found["residuals"]).max() < 0.01
    assert found["rows"][-1]["mean"] == pytest.approx(activations(config, tokens_of(config, 16)).kept, rel=0.01)


def test_a_folder_that_is_no_checkout_is_named(tmp_path, capsys):
    assert main(["--ijepa", str(tmp_path), "--json", "-"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not CHECKOUT, reason="set IWM_FAST_IJEPA to a clone of facebookresearch/ijepa")
def test_an_ijepa_encoder_by_hand():
    """In eager autocast, bytes per token of width D and H heads among N tokens: both LayerNorm inputs in fp32, 8 D, and
    outputs in bf16, 4 D; q, k, v copied for the matmuls, 6 D; softmax in fp32 and rounded, 6 H N; inputs of projection
    and second layer, 2 D and 8 D; the hidden before GELU, 8 D; statistics, 16. Once: the patches' indices, repeated
    over the width as int64, and all patches before selection, in fp32.
    """
    shape = Shape("vit_tiny", 96, 8, 2, 192, 64)
    row = compare_shape(Checkout(Path(CHECKOUT)), shape)
    n, width, heads, depth, patches = row["tokens_per_image"]["context"], 192, 3, 12, 144
    block = n * (36 * width + 6 * heads * n + 16)
    once = n * width * 8 + patches * width * 4
    assert row["peer"]["parts_per_image"]["encoder_blocks"] == depth * block + once


def test_the_committed_result_holds_together():
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    assert document["schema"] == "iwm-fast-activations/1"
    for row in document["rows"]:
        mine, theirs = row["ours"], row["peer"]
        assert mine["counted_per_image"] == pytest.approx(mine["per_image"], rel=5e-3)
        for side in (mine, theirs):
            assert sum(side["parts_per_image"].values()) == pytest.approx(side["per_image"])
        assert row["kept_ratio"] == pytest.approx(mine["per_image"] / theirs["per_image"])
        for device, largest in row["largest_batch"].items():
            memory = int(device.split()[0]) * 1e9
            for name, fixed in (("ours", mine["state"]), ("peer", theirs["state"] + theirs["rounded_weights"])):
                images, each = largest[name], row[name]["per_image"]
                assert fixed + images * each <= memory < fixed + (images + 1) * each
    batches = document["batches"]
    assert [row["images"] for row in batches["rows"]] == [2**i for i in range(10)]
    assert max(map(abs, batches["residuals"])) < 0.01
