"""The plan as a user sees it: its output, its errors, and that it follows from its parts."""

import json
from dataclasses import replace

import pytest

from iwm_fast.cli.main import main
from iwm_fast.cli.plan import planner_of
from iwm_fast.config import load_config, packaged_config
from iwm_fast.cost.communication import LINK_EFFICIENCY, LINK_HOP_S, NETWORK_HOP_S, Collective, Fabric, ring_bytes
from iwm_fast.cost.devices import ASSUMED_MFU, DEVICES, Rate, compute_rate, peak_of
from iwm_fast.cost.failures import Failures
from iwm_fast.cost.plan import Cluster
from iwm_fast.cost.scaling import scaling
from iwm_fast.cost.step_time import image_flops

RATE = Rate(0.4, "given", "--mfu")


@pytest.fixture(scope="module")
def large():
    return planner_of(load_config(packaged_config("vit_large_p16_224.yaml"), []))


def cluster(**changes) -> Cluster:
    return replace(Cluster(DEVICES["h100"], 2, 8, RATE, 50e9), **changes)


def test_the_command_answers_a_person_and_a_program(tmp_path, capsys):
    command = ["plan", "vit_base_p16_224_equi.yaml", "--nodes", "2", "--gpus-per-node", "8", "--gpu", "a100"]
    command += ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png"), "--results", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "recommended: zero.stage=1 train.activation_checkpointing=false train.micro_batch=128: " in said
    assert "change: train.micro_batch" not in said  # 128 is all of a GPU's share, and the configuration allows it
    assert "assumed (no measured step of a A100" in said
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["schema"] == "iwm-fast-plan/1"
    assert record["rate"]["origin"] == "assumed"
    assert [s["stage"] for s in record["stages"]] == [0, 1, 2, 3]
    stage = record["stages"][record["recommended"]["stage"]]
    assert stage["memory_bytes"]["total"] <= record["cluster"]["usable_bytes"]
    assert stage["micro_batch"] * stage["accumulation"] * 16 == 2048
    assert record["steps"] == round(300 * 1_281_167 / 2048)
    assert record["gpu_hours"] == pytest.approx(16 * record["hours"])
    assert record["hours"] == pytest.approx(record["steps"] * stage["step_s"]["total"] / 3600)
    assert record["scaling"]["strong"][-1]["gpus"] == 2048  # each has one image
    assert record["scaling"]["weak"][-1]["gpus"] == 8192  # on more, a batch would exceed the data set
    assert "scaling with the same batch per GPU" in said
    assert all("failures" in point for point in record["scaling"]["weak"])
    assert record["failures"]["plan"]["every_steps"] > 1
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "v100"], "--gpu v100: not known here"),
        (
            ["--nodes", "3"],
            "is 2048, which does not divide evenly over 24 ranks; make it a multiple of 24 (2040 or 2064), or change",
        ),
        (["--nodes", "1024"], "over 8192 ranks; make it a multiple of 8192 (8192 is one image per rank), or change"),
        (["--mtbf", "inf"], "Invalid value for '--mtbf'"),
        (["--restart", "nan"], "Invalid value for '--restart'"),
        (["--network", "inf"], "Invalid value for '--network'"),
        (["zero.stage=3", "zero.hpz_partition_size=16", "--nodes", "2"], "ranks 0 to 15 are on several hosts (host 0"),
        (["--results", "{folder}"], "not JSON"),
        (["--results", "{folder}/gone"], "gone: no such folder; give one with results of bench step"),
        (["model.depth=3"], "model.depth"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    arguments = [a.format(folder=tmp_path) for a in arguments]
    assert main(["plan", "vit_base_p16_224_equi.yaml", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_sources_share_the_target_s_operations():
    """Four sources per image: the target's forward pass once, and almost everything else four times."""
    config = load_config(packaged_config("vit_base_p16_224_equi.yaml"), [])
    views = config.views.model_copy(update={"sources_per_target": 4})
    one, four = planner_of(config), planner_of(config.model_copy(update={"views": views}))
    assert (one.tokens.images, four.tokens.images) == (2048, 2048)
    target = image_flops(four.config, four.tokens).target_forward / four.tokens.images
    rest = one.operations - image_flops(one.config, one.tokens).target_forward / one.tokens.images
    assert four.operations == pytest.approx(target + 4 * rest, rel=5e-3)
    stages = [planner.stages(cluster())[1] for planner in (one, four)]
    kept = [stage.memory.activations / stage.micro_batch for stage in stages]
    assert 3.9 < kept[1] / kept[0] < 4.2  # the target's tokens are saved once, not four times


def test_of_the_stages_that_are_near_the_fastest_the_largest_batch_is_recommended(large):
    """Ties go to the configured stage. With room for everything that is stage 2, without recomputation."""
    roomy = cluster()
    chosen = large.choose(large.stages(roomy), roomy).stage
    assert (chosen.stage, chosen.recompute) == (large.config.zero.stage, False) == (2, False)
    tight = cluster(device=replace(DEVICES["h100"], memory=9_500_000_000))
    stages = large.stages(tight)
    choice = large.choose(stages, tight)
    fitting = [s for s in stages if s.fits]
    near = [s for s in fitting if s.time.total <= 1.05 * min(f.time.total for f in fitting)]
    assert len(near) < len(stages)
    assert choice.stage in near
    assert choice.stage.micro_batch == max(s.micro_batch for s in near)
    assert all(s.memory.total <= tight.usable for s in stages if s.fits)


def test_the_step_s_memory_follows_the_workspace_of_the_mlp():
    """All hidden activations of a micro-batch of 128 at once, or 64 MiB of them."""
    found = {}
    for mib in (2**20, 64):
        words = ["train.micro_batch=128", "train.activation_checkpointing=false", f"model.mlp_workspace_mib={mib}"]
        config = load_config(packaged_config("vit_large_p16_224.yaml"), words)
        found[mib] = planner_of(config).configured(cluster()).memory.workspace
    forward = 128 * 196 * 4096 * 2  # of the target, in bf16
    assert found[2**20] - found[64] >= forward - 64 * 2**20


def test_where_nothing_fits_it_says_so(large):
    tiny = cluster(device=replace(DEVICES["h100"], memory=5_000_000_000))
    choice = large.choose(large.stages(tiny), tiny)
    assert choice.stage is None
    assert "nothing fits" in choice.why


def test_a_regulariser_is_planned_without_accumulation():
    changes = ["model.regularizer.kind=sigreg", "train.global_batch=32768", "zero.stage=1"]
    planned = planner_of(load_config(packaged_config("vit_large_p16_224.yaml"), changes)).variants(cluster())
    assert {(stage.micro_batch, stage.accumulation) for stage in planned} == {(2048, 1)}
    assert not all(stage.fits for stage in planned)


def test_a_measured_step_replaces_the_assumption(tmp_path):
    """The row with the nearest FLOPs per image stands for the plan's model."""
    assumed = Rate(ASSUMED_MFU, "assumed", f"no measured step of a H200 in {tmp_path.name}/")
    assert compute_rate(DEVICES["h200"], 1e11, tmp_path, None) == assumed
    sizes = {"gpu-small": (3e10, 0.41), "gpu-base": (1.2e11, 0.52), "gpu-large": (4e11, 0.6)}
    rows = [{"name": name, "operations_per_image": o, "mfu": m} for name, (o, m) in sizes.items()]
    document = {"schema": "iwm-fast-bench-step/1", "environment": {"gpus": [{"name": "NVIDIA H200"}]}, "rows": rows}
    (tmp_path / "step_h200.json").write_text(json.dumps(document))
    (tmp_path / "cpu.json").write_text(json.dumps(document | {"environment": {"gpus": []}}))
    (tmp_path / "unknown_peak.json").write_text(json.dumps(document | {"rows": [rows[0] | {"mfu": None}]}))
    measured = Rate(0.52, "measured", "step_h200.json, gpu-base")
    assert compute_rate(DEVICES["h200"], 1e11, tmp_path, None) == measured
    assert compute_rate(DEVICES["h100"], 1e11, tmp_path, None).origin == "assumed"
    assert compute_rate(DEVICES["h200"], 1e11, tmp_path, 0.3).origin == "given"


def test_rings_cross_a_host_s_border_once_for_each_of_its_gpus():
    """The bytes over all links are the ring's; counted by hand for two hosts of four GPUs."""
    fabric = Fabric(2, 4, 400e9, 50e9)
    moved = fabric.transfer(Collective("gradients", "all_reduce", 800, 3))
    assert moved.link_bytes + moved.network_bytes == ring_bytes("all_reduce", 800, 8) == 1400
    assert moved.network_bytes == 350
    assert moved.network_s == 350 / (50e9 * LINK_EFFICIENCY)
    gathered = fabric.transfer(Collective("parameters", "all_gather", 800, 3))
    assert gathered.latency_s == pytest.approx(3 * (1 * NETWORK_HOP_S + 6 * LINK_HOP_S))
    alone = Fabric(1, 8, 400e9, 50e9).transfer(Collective("gradients", "all_reduce", 800, 1))
    assert alone.network_bytes == 0


@pytest.mark.parametrize(("nodes", "gpus", "over_network", "within"), [(2, 4, 1, 3), (1024, 8, 10, 7), (5, 1, 3, 0)])
def test_an_all_reduce_goes_through_trees_of_hosts(nodes, gpus, over_network, within):
    """Two rounds of log₂ hops, where a ring has one per GPU; within a host both are the same chain."""
    moved = Fabric(nodes, gpus, 400e9, 50e9).transfer(Collective("gradients", "all_reduce", 800, 3))
    assert moved.latency_s == pytest.approx(3 * 2 * (over_network * NETWORK_HOP_S + within * LINK_HOP_S))
    assert moved.link_bytes + moved.network_bytes == pytest.approx(ring_bytes("all_reduce", 800, nodes * gpus))
    alone = Fabric(1, 8, 400e9, 50e9)
    one = [alone.transfer(Collective("", kind, 800, 1)).latency_s for kind in ("all_reduce", "all_gather")]
    assert one == pytest.approx([2 * 7 * LINK_HOP_S, 7 * LINK_HOP_S])


def test_slow_data_decide_the_step(large):
    one = cluster(data_rate=10.0)
    stage = large.choose(large.stages(one), one).stage
    assert stage.time.total == stage.time.data == pytest.approx(2048 / 16 / 10)


def test_weak_scaling_keeps_each_gpu_s_share_and_pays_for_messages(large):
    """Each number of GPUs has the setting that is recommended there, at most 5 % slower than the fastest."""
    points = scaling(large, cluster(), 10**9, Failures())["weak"]
    assert {p.global_batch // p.gpus for p in points} == {128}
    each = {p.gpus: p.images_per_s / p.gpus for p in points if p.images_per_s is not None}
    assert each[16384] < each[1024] < each[64]
    assert each[64] < 1.05 * each[8]
    at = cluster(nodes=128)
    fastest = min(s.time.total for s in large.with_batch(128 * 1024).stages(at))
    assert each[1024] >= 128 / fastest / 1.05


def test_every_gpu_has_a_source_and_torch_s_names_are_known():
    assert all(device.source.startswith("nvidia.com/") for device in DEVICES.values())
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA GeForce RTX 4090") is None


def test_static_shapes_cost_their_padding_and_graphs_their_gradients_but_no_launches(large):
    """At one micro-batch: 2.1 % more tokens, less time, since the target has no padding; plus a copy of gradients."""
    words = ["train.micro_batch=128", "train.static_shapes=true"]
    plain, static, graph = (
        planner_of(load_config(packaged_config("vit_large_p16_224.yaml"), words[:n] + more)).configured(cluster())
        for n, more in ((1, []), (2, []), (2, ["train.cuda_graph=true"]))
    )
    assert plain.padded == 0
    assert 0.01 < static.padded < 0.03
    share = 1 / (1 - static.padded)
    assert static.memory.activations == pytest.approx(plain.memory.activations * share, rel=1e-6)
    assert static.time.backward == pytest.approx(plain.time.backward * share)
    assert 1 < static.time.forward / plain.time.forward < share
    assert graph.memory.workspace - static.memory.workspace == 2 * large.layout.trained_size
    assert graph.time.launches == 0 < static.time.launches
    assert graph.time.exposed >= static.time.exposed
