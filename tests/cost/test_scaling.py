"""The plan from 1 to 16,384 GPUs: which numbers, with which batch, and what failures take of each."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from small_run import small_config

from iwm_fast.cost.devices import DEVICES, Rate
from iwm_fast.cost.failure_report import SCALING_COLUMNS, scaling_rows
from iwm_fast.cost.failures import Failures
from iwm_fast.cost.plan import Cluster, Planner
from iwm_fast.cost.report import ImageCount, document, sentences
from iwm_fast.cost.scaling import draw_scaling, efficiency, scaling, scaling_limits
from iwm_fast.cost.tokens import Tokens

MANY = 10**8


@cache
def planned(batch=2048, gpus=8, nodes=2, images=MANY, **failures):
    config = small_config(Path("unused"), train__global_batch=batch, train__schedule_steps=None, zero__stage=1)
    planner = Planner(config, Tokens(np.array([7] * 16), np.array([5] * 16)))
    at = Cluster(DEVICES["h100"], nodes, gpus, Rate(0.4, "given", "--mfu"), 50e9)
    return planner, at, scaling(planner, at, images, Failures(**failures)), scaling_limits(planner, at, images)


def test_points_double_from_one_gpu_to_16_384():
    _, _, points, said = planned()
    assert [p.gpus for p in points["weak"]] == [2**k for k in range(15)]
    assert {p.global_batch / p.gpus for p in points["weak"]} == {128}
    assert [p.gpus for p in points["strong"]] == [2**k for k in range(12)]
    assert {p.global_batch for p in points["strong"]} == {2048}
    (line,) = said
    assert line.startswith("same global batch: ends at 2,048 GPUs, because train.global_batch 2,048 has fewer images")


@pytest.mark.parametrize(
    ("gpus", "nodes", "sizes"),
    [
        (6, 4, [1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 6144, 12288]),
        (8, 3, [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]),
        (1, 1, [2**k for k in range(15)]),
    ],
)
def test_hosts_of_any_size_are_doubled_and_the_cluster_itself_is_among_them(gpus, nodes, sizes):
    """Doubling the GPUs alone would end at the last power of two within a host of six."""
    planner, at, points, _ = planned(batch=gpus * nodes * 32, gpus=gpus, nodes=nodes)
    assert [p.gpus for p in points["weak"]] == sizes
    own = next(p for p in points["weak"] if p.gpus == at.world)
    recommended = planner.choose(planner.stages(at), at).stage
    assert own.images_per_s == pytest.approx(planner.config.train.global_batch / recommended.time.total)


def test_a_batch_that_the_gpus_do_not_divide_is_rounded_and_said():
    _, _, points, said = planned(batch=2000)
    batches = {p.gpus: p.global_batch for p in points["strong"]}
    assert (batches[16], batches[32], batches[64], batches[1024]) == (2000, 1984, 1984, 2048)
    assert said[0] == (
        "same global batch: 32 GPUs do not divide train.global_batch 2,000; planned with 1,984 images there, and with "
        "the nearest multiple on more"
    )


def test_a_batch_with_more_images_than_the_data_set_is_not_planned():
    _, _, points, said = planned(images=100_000)
    assert points["weak"][-1].gpus == 512
    assert said[-1] == (
        "same batch per GPU: ends at 512 GPUs, because 128 images per GPU on more are more than the data set's 100,000"
    )


def test_more_gpus_fail_more_often_and_lose_more():
    """Per hour; of the shares a table row says the total."""
    _, _, points, _ = planned(gpu_hours=1_000.0)
    weak = [p.failures for p in points["weak"]]
    assert [f.mean_s for f in weak] == [3.6e6 / p.gpus for p in points["weak"]]
    lost = [f.loss.total for f in weak]
    assert lost == sorted(lost)
    rows = scaling_rows(points, "weak")
    assert all(len(row) == len(SCALING_COLUMNS) for row in rows)
    assert rows[-1][0] == "16,384"
    assert rows[-1][-1] == f"{100 * lost[-1]:.0f}%"


def test_where_nothing_fits_the_row_says_so_and_the_picture_is_still_drawn(tmp_path):
    planner, at, points, _ = planned()
    tiny = replace(at, device=replace(at.device, memory=10**9))
    none = scaling(planner, tiny, MANY, Failures())
    assert scaling_rows(none, "weak")[0][2] == "none fits"
    assert set(efficiency(none)["weak"]) == {None}
    assert max(share for line in efficiency(points).values() for share in line) == 1.0
    assert [row[0] for row in scaling_rows(points, "weak", 8)][:2] == ["8", "16"]
    for name, drawn in (("none.png", none), ("all.png", points)):
        draw_scaling(drawn, "title", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def said_of(images, **failures):
    planner, at, _, _ = planned()
    record = document(planner, at, ImageCount(images, "given", "--images"), Failures(**failures))
    return record, "\n".join(sentences(record, None))


def test_the_plan_says_failures_the_interval_to_paste_and_what_the_configured_one_loses():
    record, said = said_of(MANY, gpu_hours=50.0)
    failures = record["failures"]
    plan, every = failures["plan"], failures["plan"]["every_steps"]
    assert failures["change"] == f"checkpoint.every_steps={every}"
    assert f"on 16 GPUs); checkpoint.every_steps={every} (every " in said
    assert f"checkpoints as configured, every 1,000 steps ({failures['configured']['interval_s']:.2g} s), lose" in said
    assert plan["lost_share"] == pytest.approx(sum(plan["loss"].values()))
    assert plan["lost_share"] < failures["configured"]["lost_share"]
    assert "by Young (1974)" in said
    assert "by Daly (2006)" in said
    assert "one GPU stops the job every 50 hours (--mtbf)" in said


def test_the_interval_to_paste_replaces_one_in_epochs():
    planner, at, _, _ = planned()
    config = planner.config
    epochs = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every_epochs": 2.0})})
    record = document(Planner(epochs, planner.tokens, planner.layout), at, ImageCount(MANY, "given", "--images"))
    assert record["failures"]["change"].endswith(" checkpoint.every_epochs=null")
    assert record["failures"]["configured"]["every_steps"] == round(2 * MANY / 2048)


def test_a_short_run_is_said_to_need_its_last_checkpoint_alone():
    record, said = said_of(20_000)
    assert record["failures"]["plan"]["every_steps"] == record["steps"]
    assert f"checkpoint.every_steps={record['steps']} (every " in said
    assert ": the last one is enough) loses " in said
    assert "arXiv:2407.21783" in said


def test_a_job_that_would_hardly_ever_end_is_said_to():
    _, said = said_of(MANY, gpu_hours=0.02)
    assert "failures: one in 4.5 s on 16 GPUs, and a restart takes 5 minutes: the run would hardly ever end" in said
