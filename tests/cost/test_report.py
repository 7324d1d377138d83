"""What a plan recommends to change: found by search over micro-batch, recomputation and stage; checked by hand."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_images import write_images
from made_triplets import write_game
from small_run import small_config

from iwm_fast.cli import plan as plan_command
from iwm_fast.cli.plan import planner_of
from iwm_fast.config import load_config, packaged_config
from iwm_fast.cost.devices import DEVICES, Rate, compute_rate
from iwm_fast.cost.memory import Layout, Parameter
from iwm_fast.cost.plan import FRAGMENTED, RESERVED, Cluster, Planner
from iwm_fast.cost.report import ImageCount, document, duration, of_gpus, sentences
from iwm_fast.cost.step_time import image_flops
from iwm_fast.cost.tokens import Tokens
from iwm_fast.data.tools.index import write_index
from iwm_fast.errors import UserError

RATE = Rate(0.4, "given", "--mfu")
SET = ImageCount(1_281_167, "given", "--images")


def cluster(nodes=1, gpus=8, gpu="h200", **changes) -> Cluster:
    return replace(Cluster(DEVICES[gpu], nodes, gpus, RATE, DEVICES[gpu].network), **changes)


@pytest.fixture(scope="module")
def large():
    return planner_of(load_config(packaged_config("vit_large_p16_224.yaml"), []), 256)


def changed(planner, *overrides):
    config = load_config(packaged_config("vit_large_p16_224.yaml"), overrides)
    return Planner(config, planner.tokens, planner.layout)


def advice(planner, at=None, images=SET):
    record = document(planner, at or cluster(), images)
    return record, "\n".join(sentences(record, None))


def test_the_shipped_recomputation_is_counted_and_taken_away(large):
    """Eight H200: the time saved is that of the forward passes that recomputation repeats, by hand."""
    record, said = advice(large)
    recommended, configured = record["recommended"], record["configured"]
    assert (configured["stage"], configured["activation_checkpointing"], configured["micro_batch"]) == (2, True, 128)
    assert (recommended["stage"], recommended["activation_checkpointing"]) == (2, False)
    assert recommended["micro_batch"] == 2048 // 8
    flops = image_flops(large.config, large.tokens)
    repeated = (flops.context_forward + flops.predictor_forward) / large.tokens.images * 256 / (989e12 * 0.4)
    steps = round(300 * 1_281_167 / 2048)
    messages = configured["step_s"]["exposed"] - next(
        v["step_s"]["exposed"] for v in record["variants"] if (v["stage"], v["activation_checkpointing"]) == (2, False)
    )
    assert recommended["gain"]["hours"] == pytest.approx(steps * (repeated + messages) / 3600)
    assert recommended["gain"]["gpu_hours"] == pytest.approx(8 * recommended["gain"]["hours"])
    assert recommended["gain"]["hours"] == pytest.approx(configured["hours"] - record["hours"])
    memory = configured["memory_bytes"]["total"] - recommended["memory_bytes"]
    assert recommended["gain"]["memory_bytes"] == memory < 0
    assert "change: train.activation_checkpointing=false train.micro_batch=256\n" in said
    assert f"gain: {duration(recommended['gain']['hours'])} (" in said


@pytest.mark.parametrize(("gpu", "memory"), [("h200", 141), ("a100-40gb", 40), ("h100", 12)])
def test_each_variant_has_the_largest_micro_batch_that_fits(large, gpu, memory):
    """Every divisor of a GPU's share tried in turn, as a configuration."""
    at = cluster(gpus=2, device=replace(DEVICES[gpu], memory=memory * 10**9))
    divisors = [d for d in range(1, 1025) if 1024 % d == 0]
    variants = large.variants(at)
    assert len(variants) == 7
    for variant in variants:
        fitting = []
        for divisor in divisors:
            words = [f"zero.stage={variant.stage}", f"train.activation_checkpointing={str(variant.recompute).lower()}"]
            asked = changed(large, *words, f"train.micro_batch={divisor}").configured(at)
            assert (asked.micro_batch, asked.accumulation) == (divisor, 1024 // divisor)
            assert asked.fits == (asked.memory.total <= memory * 1e9 * (1 - FRAGMENTED) - RESERVED)
            fitting += [divisor] if asked.fits else []
        assert (variant.micro_batch, variant.fits) == (max(fitting, default=1), bool(fitting))


def test_the_change_pasted_behind_the_configuration_leaves_nothing_to_change(large):
    """The same hours and memory as promised, for every kind of machine."""
    for at in (cluster(), cluster(4), cluster(gpus=1, gpu="a100-40gb"), cluster(4, 1, "l40s")):
        record, _ = advice(large, at)
        again, said = advice(changed(large, *shlex.split(record["recommended"]["change"])), at)
        assert again["recommended"]["change"] == ""
        assert "change: nothing; the configuration is the recommended setting" in said
        assert again["configured"]["hours"] == again["hours"] == pytest.approx(record["hours"])
        assert again["configured"]["memory_bytes"]["total"] == record["recommended"]["memory_bytes"]


def test_a_configuration_that_does_not_fit_is_said_not_to(large):
    """A micro-batch that is too large is changed; the time is no gain, because the run could not start."""
    at = cluster(gpus=1, device=replace(DEVICES["h100"], memory=40 * 10**9))
    record, said = advice(changed(large, "train.activation_checkpointing=false", "train.micro_batch=2048"), at)
    assert not record["configured"]["fits"]
    assert record["configured"]["micro_batch"] == 2048
    assert record["recommended"]["gain"] is None
    assert "GB usable, does not fit" in said
    assert "gain: it fits; " in said
    assert f"train.micro_batch={record['recommended']['micro_batch']}" in record["recommended"]["change"]


def test_muons_matmuls_are_planned_and_divided_over_the_gpus(large):
    """By hand: 5 iterations of X Xᵀ, its square, and a product with X, of every matrix that decays."""
    words = ["zero.stage=0", "train.activation_checkpointing=false"]
    shapes = [sorted(p.shape) for p in large.layout.trained if p.decayed and len(p.shape) == 2]
    alone = sum(5 * (4 * s**2 * m + 2 * s**3) for s, m in shapes) / (989e12 * 0.4)
    for gpus, tolerance in ((1, 1e-6), (8, 0.05)):
        adamw, muon = (
            changed(large, *words, f"train.optimizer={name}").configured(cluster(gpus=gpus)).time
            for name in ("adamw", "muon")
        )
        assert muon.optimizer - adamw.optimizer == pytest.approx(alone / gpus, rel=tolerance)
        assert (muon.communication > adamw.communication) is (gpus > 1)


def test_recomputation_is_recommended_where_nothing_else_fits(large):
    """Memory between what one image needs with recomputation and without, at the stage that shards most."""
    at = cluster(gpus=2, device=replace(DEVICES["h100"], memory=10**9))
    needed = {v.recompute: v.memory.total for v in large.variants(at) if v.stage == 3}
    assert needed[True] < needed[False] == min(v.memory.total for v in large.variants(at) if not v.recompute)
    usable = (needed[True] + needed[False]) // 2
    memory = int((usable + RESERVED) / (1 - FRAGMENTED))
    record, said = advice(large, replace(at, device=replace(at.device, memory=memory)))
    recommended = record["recommended"]
    assert (recommended["stage"], recommended["activation_checkpointing"]) == (3, True)
    assert "; without recomputation it does not fit" in said


def test_a_micro_batch_of_a_few_images_without_recomputation_is_no_gain(large):
    """Launching kernels for single images takes longer than recomputing for many at once."""
    words = ["zero.stage=1", "train.activation_checkpointing=false", "train.micro_batch=4"]
    usable = changed(large, *words).configured(cluster(gpus=1)).memory.total
    device = replace(DEVICES["h100"], memory=int((usable + RESERVED + 1) / (1 - FRAGMENTED)) + 1)
    at = cluster(gpus=1, device=device)
    found = {(v.stage, v.recompute): v for v in large.variants(at)}
    few, many = found[1, False], found[1, True]
    assert (few.micro_batch, few.fits, many.fits) == (4, True, True)
    assert many.micro_batch >= 16
    assert few.time.backward == pytest.approx(2048 / 4 * (24 + 36) * 2 * 80e-6)  # blocks, twice the forward's operators
    assert large.choose(large.stages(at), at).stage.recompute


LEFT_OUT = {
    "recomputation at stage 0": ([], 0, True, "refused: train.activation_checkpointing in bf16 needs zero.stage 1, 2"),
    "slower": ([], 1, True, r"% slower than stage 1 without recomputation, which fits"),
    "near": ([], 3, False, "another stage is recommended from 5% on"),
    "compiled": (["train.compile=true"], 3, False, "refused: train.compile needs zero.stage 0, 1 or 2"),
    "beside": (["train.target_stream=true"], 3, True, "refused: train.target_stream needs zero.stage 0, 1 or 2"),
    "lamb": (
        ["train.optimizer=lamb", "zero.stage=0", "train.activation_checkpointing=false"], 2, False,
        "refused: train.optimizer lamb needs whole tensors, which zero.stage 2 shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_every_stage_that_is_left_out_has_its_reason(large, case):
    """Of eight variants: the recommended one, and seven with a reason each. Refused ones are not planned."""
    overrides, stage, recompute, why = LEFT_OUT[case]
    record, _ = advice(changed(large, *overrides))
    own = {(e["stage"], e["activation_checkpointing"]): e["why"] for e in record["left_out"]}
    chosen = (record["recommended"]["stage"], record["recommended"]["activation_checkpointing"])
    assert own.keys() == {(s, r) for s in range(4) for r in (False, True)} - {chosen}
    assert why in own[stage, recompute]
    planned = {(v["stage"], v["activation_checkpointing"]) for v in record["variants"]}
    assert planned == {key for key in own if not own[key].startswith("refused: ")} | {chosen}


def test_what_does_not_fit_says_what_it_needs(large):
    record, said = advice(large, cluster(device=replace(DEVICES["h100"], memory=5 * 10**9)))
    assert record["recommended"]["stage"] is None
    assert record["hours"] is None
    assert "recommended: none: nothing fits 2 GB usable of 5 GB" in said
    assert all("does not fit: " in e["why"] or "refused" in e["why"] for e in record["left_out"])
    assert len(record["left_out"]) == 8


def test_fp32_is_planned_at_fp32_s_rate_and_not_the_matrix_units(large):
    """Torch's default multiplies fp32 without TF32: 67 TFLOP/s of an H200 instead of 989."""
    half, full = large, changed(large, "train.precision=fp32")
    times = [p.configured(cluster()).time.forward for p in (half, full)]
    assert times[1] / times[0] == pytest.approx(989 / 67)
    assert "40% of 67 TFLOP/s in fp32" in advice(full)[1]
    measured = compute_rate(DEVICES["h200"], 1e11, Path("nowhere"), None, "fp32")
    assert measured.origin == "assumed"


def test_a_run_that_ends_early_is_planned_to_its_end(large):
    record, said = advice(changed(large, "train.steps=1000"))
    assert (record["steps"], record["schedule_steps"]) == (1000, round(300 * 1_281_167 / 2048))
    assert record["hours"] == pytest.approx(1000 * record["variants"][3]["step_s"]["total"] / 3600)
    assert "train.steps ends the run at 1,000 of its schedule's 187,671 steps" in said


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (0.0092 / 3600, "0.0092 s"), (59.4 / 3600, "59 s"), (0.05, "3 minutes"), (1.5, "90 minutes"),
        (4.84, "4.8 hours"), (71.96, "72.0 hours"), (1000, "1,000 hours (41.7 days)"), (62.5e6, "7,130 years"),
    ],
)  # fmt: skip
def test_lengths_are_said_in_units_that_show_them(hours, said):
    assert duration(hours) == said


@pytest.mark.parametrize(
    ("gpu_hours", "said"),
    [(1e-5, "less than 0.001"), (0.0184, "0.018"), (0.5, "0.5"), (7.25, "7.2"), (1183.4, "1,183")],
)
def test_gpu_hours_are_never_zero(gpu_hours, said):
    assert of_gpus(gpu_hours) == f"{said} GPU-hours"


def test_a_plan_of_one_gpu_and_a_short_run_shows_no_zeros():
    """No links, milliseconds per step, seconds in all: each is shown in a fitting unit, and noted."""
    planner = planner_of(load_config(packaged_config("vit_tiny_p4_32.yaml"), []), 64)
    record, said = advice(planner, cluster(gpus=1), ImageCount(100, "given", "--images"))
    assert all(v["sent_bytes"] == 0 for v in record["variants"])
    assert "0.0 hours" not in said
    assert " 0 GPU-hours" not in said
    assert "note: the data set has 100 images, and train.global_batch is 128: each step has an image 1.28 times" in said
    blocks = {"forward": 2 * 4 + 4, "backward": 2 * (4 + 4)}  # both encoders and the predictor; twice the operators
    for part, count in blocks.items():
        assert record["configured"]["step_s"][part] >= count * 80e-6


def test_images_are_counted_where_the_data_are_here_and_said_to_be_assumed_where_not(large, tmp_path):
    """A folder, a manifest of it, --images before both; missing data are noted above the recommendation."""
    write_images(tmp_path / "set", 5)
    write_index(tmp_path / "set", tmp_path / "m.tsv")
    for root, given, images, origin in (
        (tmp_path / "set", None, 5, "counted"),
        (tmp_path / "m.tsv", None, 5, "counted"),
        (tmp_path / "set", 9, 9, "given"),
        (tmp_path / "gone", None, 1_281_167, "assumed"),
        ("s3://bucket/train", None, 1_281_167, "assumed"),
    ):
        planner = changed(large, f"data.root={root}")
        _, found = plan_command._images_of(planner.config, given)
        assert (found.count, found.origin) == (images, origin)
        record, said = advice(planner, images=found)
        assert (record["images"], record["images_origin"]) == (images, origin)
        assert (f"note: data.root: {root}: " in said) == (origin == "assumed")
    assert "an object store, which plan does not list" in said


def test_data_that_a_training_would_refuse_are_refused(large, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        plan_command._images_of(changed(large, f"data.root={tmp_path / 'empty'}").config, None)


def test_the_actions_of_triplets_are_those_of_their_manifest(tmp_path):
    """The configuration need not name them if the manifest is on this machine."""
    write_game(tmp_path / "game")
    config = load_config(packaged_config("game.yaml"), [f"data.root={tmp_path / 'game'}"])
    resolved, images = plan_command._images_of(config, None)
    assert images.count == 4 * 6
    assert planner_of(resolved, 8).operations > 0


def test_the_longest_share_of_the_encoder_is_that_of_elements_dealt_one_by_one():
    """Three ranks split two groups of odd lengths: each element's owner by hand."""
    parameters = (
        Parameter("encoder.a", 17, decayed=True), Parameter("predictor.b", 5, decayed=True),
        Parameter("encoder.c", 11, decayed=True), Parameter("encoder.d", 3, decayed=False),
        Parameter("predictor.e", 4, decayed=False),
    )  # fmt: skip
    layout = Layout(parameters, parameters[:1])
    for world in (1, 2, 3, 5, 7):
        owned = np.zeros(world, int)
        for group, flat in zip(layout.groups(), layout.flat_sizes(world), strict=True):
            names = [p.name for p in group for _ in range(p.size)]
            for place, name in enumerate(names):
                owned[place // (flat // world)] += name.startswith("encoder.")
        assert layout.longest_share(world) == owned.max()
        assert owned.sum() == 31


def test_a_source_more_is_a_row_more_of_tokens_and_pixels(tmp_path):
    """Memory by hand for four sources: pixels of one target and four sources, in each prefetched batch."""
    config = small_config(tmp_path, views={"sources_per_target": 4})
    tokens = Tokens(np.array([7] * 16), np.array([5] * 16), 4)
    planner = Planner(config, tokens)
    stage = planner.configured(cluster(gpus=1))
    one = Planner(config.model_copy(update={"data": config.data.model_copy(update={"prefetch": 4})}), tokens)
    more = one.configured(cluster(gpus=1)).memory.workspace - stage.memory.workspace
    assert more == 8 * (1 + 4) * 3 * 32**2 * (4 - config.data.prefetch)
