"""A run resumes with another number of ranks and another ZeRO stage: same trajectory, each sample once per epoch."""

import json
import os
from collections import Counter

import pytest
from launched import on_ranks
from small_run import losses, metrics, small_config

from iwm_fast.engine import pretrain

pytestmark = pytest.mark.skipif(
    not os.environ.get("IWM_FAST_FAULTS"), reason="four ranks on two cores take minutes; IWM_FAST_FAULTS=1 runs it"
)
STEPS, IMAGES = 18, 24
CHAINS = {
    "two_2_one_1_four_2": [(2, 2), (1, 1), (4, 2)],
    "two_3_four_3": [(2, 3), (4, 3)],
    "two_3_two_1_one_0_two_3": [(2, 3), (2, 1), (1, 0), (2, 3)],
}


@pytest.fixture(scope="module")
def runs(tiny_images, tmp_path_factory):
    """Run the chains, their parts grouped by number of ranks where order allows, so that each imports once."""
    out = tmp_path_factory.mktemp("worlds")
    pretrain(small_config(tiny_images, train__steps=STEPS, train__schedule_steps=STEPS), out / "straight")
    for part in range(max(map(len, CHAINS.values()))):
        jobs: dict[int, list] = {}
        for name, chain in CHAINS.items():
            if part < len(chain):
                world, stage = chain[part]
                stop = STEPS * (part + 1) // len(chain)
                changes = {"zero__stage": stage, "train__steps": stop, "train__schedule_steps": STEPS}
                job = {"name": name, "record": f"{name}.{part}", "resume": "auto", **changes}
                jobs.setdefault(world, []).append(job)
        for world, group in jobs.items():
            on_ranks(world, tiny_images, out, group)
    return out


@pytest.mark.parametrize("name", CHAINS)
def test_the_trajectory_is_that_of_an_undivided_run(name, runs):
    assert [record["step"] for record in metrics(runs / name)] == list(range(1, STEPS + 1))
    assert losses(runs / name) == pytest.approx(losses(runs / "straight"), rel=1e-3)


@pytest.mark.parametrize("name", CHAINS)
def test_each_sample_is_seen_exactly_once_an_epoch(name, runs):
    seen = Counter()
    for part, (world, _) in enumerate(CHAINS[name]):
        for rank in range(world):
            steps = json.loads((runs / f"{name}.{part}.{rank}.json").read_text())["steps"]
            seen.update(tuple(sample) for step in steps for sample in step["samples"])
    epochs = STEPS * 8 // IMAGES
    assert seen == Counter((epoch, sample) for epoch in range(epochs) for sample in range(IMAGES))
