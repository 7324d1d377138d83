"""Trainings with data.order shard: checkpoints record the order, and a run resumes in it on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from launched import on_ranks
from made_images import write_images
from small_run import losses, small_config, state

from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.tools.shard import write_shards
from iwm_fast.engine import pretrain
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.errors import UserError

IMAGES, BATCH = 30, 12
SHARD = {"data__order": "shard", "data__streams": 12, "data__shuffle_window": 2, "train__global_batch": BATCH}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    home = tmp_path_factory.mktemp("shards")
    write_images(home / "images", IMAGES)
    write_shards(home / "images", home / "packed", shard_bytes=5_000)
    assert len(list((home / "packed").glob("*.tar"))) >= 12
    return home / "packed"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(small_config(shards, train__steps=2, **SHARD), out)
    return out


def test_a_resumed_run_equals_one_that_was_never_stopped(shards, run, tmp_path, capfd):
    index = Checkpoint(run / "checkpoints/step_000002").index
    assert index["order"] == "sharded"
    assert {key: index["streams"][key] for key in ("streams", "window")} == {"streams": 12, "window": 2}
    pretrain(small_config(shards, train__steps=4, **SHARD), tmp_path / "straight")
    said = capfd.readouterr().err
    assert f"data.order shard: {index['streams']['shards']} shards in 12 streams, 12 per rank, shuffled in win" in said
    assert "come in another order" not in said
    for key, words in (("order", "sample"), ("streams", 6), ("shuffle_window", 3)):
        with pytest.raises(
            UserError, match=rf"config.yaml: data.{key} was .* and is {words} now; a resumed run keeps it"
        ):
            pretrain(small_config(shards, train__steps=4, **(SHARD | {f"data__{key}": words})), run, "auto")
    pretrain(small_config(shards, train__steps=4, **SHARD), run, "auto")
    assert losses(run) == losses(tmp_path / "straight")
    straight = state(tmp_path / "straight", 4)
    assert all(torch.equal(tensor, straight[key]) for key, tensor in state(run, 4).items())


OTHER = (
    ": the remaining samples come in another order than when the checkpoint was written, so in this epoch some come "
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__order": "sample"}, "data.order was shard and is sample now"),
        pytest.param({"data__streams": 6}, "data.streams was 12 and is 6 now", marks=pytest.mark.slow),
        pytest.param({"data__shuffle_window": 3}, "data.shuffle_window was 2 and is 3 now", marks=pytest.mark.slow),
    ],
    ids=["order", "streams", "window"],
)
def test_a_new_run_from_a_checkpoint_of_another_order_says_so(changes, said, shards, run, tmp_path, capfd, monkeypatch):
    seen = []
    plain = TrainingStream.__next__
    monkeypatch.setattr(TrainingStream, "__next__", lambda stream: seen.append(plain(stream)) or seen[-1])
    config = small_config(shards, train__steps=3, **(SHARD | changes))
    pretrain(config, tmp_path / "new", str(run / "checkpoints/step_000002"))
    assert capfd.readouterr().err.count(said + OTHER) == 1
    (batch,) = seen
    order = "feistel" if "data__order" in changes else "sharded"
    assert Checkpoint(tmp_path / "new/checkpoints/step_000003").index["order"] == order
    assert len(batch.ids) == BATCH


@pytest.mark.slow
def test_a_shard_list_that_changed_is_said_with_the_shards(shards, run, tmp_path, capfd):
    moved = sorted(shards.glob("*.tar"))[1]
    for path in (moved, moved.with_suffix(".idx")):
        path.rename(path.with_name(f"zzz{path.suffix}"))
    try:
        config = small_config(shards, train__steps=5, **SHARD)
        pretrain(config, tmp_path / "new", str(run / "checkpoints/step_000002"))
    finally:
        for suffix in (".tar", ".idx"):
            (shards / f"zzz{suffix}").rename(moved.with_suffix(suffix))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "gone" in line]
    assert f"1 shard gone ({moved.name}); 1 shard new (zzz.tar)" in line


def test_settings_that_do_not_fit_end_before_anything_is_written(shards, tmp_path):
    with pytest.raises(UserError, match=r"^data\.streams is 12, which does not divide train\.glo"):
        pretrain(small_config(shards, **(SHARD | {"train__global_batch": 8})), tmp_path / "run")
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
def test_a_training_on_two_ranks_goes_on_alone_and_on_three(shards, tmp_path):
    length = {"train__schedule_steps": 9}
    pretrain(small_config(shards, **SHARD, **length), tmp_path / "straight")
    seen = Counter()
    for part, world in enumerate((2, 1, 3)):
        job = {"name": "parts", "record": f"part{part}", "resume": "auto", "train__steps": 3 * (part + 1)}
        on_ranks(world, shards, tmp_path, [{**job, **SHARD, **length, "train__micro_batch": 2}])
        for rank in range(world):
            steps = json.loads((tmp_path / f"part{part}.{rank}.json").read_text())["steps"]
            seen.update(tuple(sample) for step in steps for sample in step["samples"])
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "straight"), rel=1e-3)
    assert max(seen.values()) == 1
    assert {pair for pair in seen if pair[0] < 3} == {(e, i) for e in range(3) for i in range(IMAGES)}
