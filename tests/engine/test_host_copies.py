"""ZeRO within a host: four CPU ranks, in pairs that hold a copy of the parameters, against four without."""

import pytest
import torch
from launched import on_ranks
from small_run import losses, metrics, small_config, state

from iwm_fast.engine import pretrain
from iwm_fast.engine.host_copies import drop
from iwm_fast.errors import UserError

# Two micro-batches per rank and step: the second one reads the pair's copy.
SHAPES = {
    "fp32": {"train__micro_batch": 1},
    "bf16": {"train__micro_batch": 1, "train__precision": "bf16"},
    "recomputed": {"train__micro_batch": 1, "train__activation_checkpointing": True},
}
STEPS = 6


@pytest.fixture(scope="module")
def runs(tiny_images, tmp_path_factory):
    """Of each shape: without, in pairs, and in pairs and two halves; one more resumed in fours, and by a rank alone."""
    out = tmp_path_factory.mktemp("hosts")
    jobs = []
    for name, changes in SHAPES.items():
        shape = {"zero__stage": 3, "train__steps": STEPS, **changes}
        pairs, half = shape | {"zero__hpz_partition_size": 2}, {"train__steps": STEPS // 2}
        jobs += [{"name": f"pairs_{name}", **pairs}, {"name": f"plain_{name}", **shape}]
        jobs += [{"name": f"halves_{name}", **pairs, **half}, {"name": f"halves_{name}", **pairs, "resume": "auto"}]
    alone = {"name": "alone", "zero__stage": 3, "zero__hpz_partition_size": 4}
    jobs += [{**alone, "train__steps": STEPS // 2}, {**alone, "train__steps": STEPS - 1, "resume": "auto"}]
    on_ranks(4, tiny_images, out, jobs)
    pretrain(small_config(tiny_images, zero__stage=1, train__steps=STEPS), out / "alone", resume="auto")
    return out


@pytest.mark.slow  # four ranks, a dozen trainings
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["pairs", "halves"])
def test_copies_within_a_host_change_no_bit(runs, kind, shape):
    """Neither of a whole run nor of a resumed one; each step moves the EMA, so that a stale copy would show."""
    found, plain = (state(runs / f"{name}_{shape}", STEPS) for name in (kind, "plain"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert losses(runs / f"{kind}_{shape}") == losses(runs / f"plain_{shape}")
    norms = [[r["grad_norm"] for r in metrics(runs / f"{name}_{shape}")] for name in (kind, "plain")]
    assert norms[0] == norms[1]


@pytest.mark.slow
def test_a_run_resumes_with_copies_of_another_size_and_without(runs):
    assert losses(runs / "alone") == pytest.approx(losses(runs / "plain_fp32"), rel=1e-4)


def test_more_ranks_than_there_are_is_one_line_before_anything_is_written(tiny_images, tmp_path):
    config = small_config(tiny_images, zero__stage=3, zero__hpz_partition_size=2)
    with pytest.raises(UserError, match=r"^zero.hpz_partition_size is 2, and there are 1 rank\(s\); give at most 1"):
        pretrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_copies_are_dropped():
    with_copy, without = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with_copy.ds_secondary_tensor = torch.ones(1)
    drop([with_copy, without])
    assert with_copy.ds_secondary_tensor is None
    assert not hasattr(without, "ds_secondary_tensor")
