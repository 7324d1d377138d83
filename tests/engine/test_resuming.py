"""What may differ when a run resumes, and which data it accepts."""

import shutil

import pytest
import torch
from small_run import losses, metrics, small_config, state

from iwm_fast.cli.main import main
from iwm_fast.config import Config
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.data.order import FEISTEL, SORTED
from iwm_fast.engine import pretrain, resuming
from iwm_fast.engine.checkpoint.format import Checkpoint
from iwm_fast.engine.checkpoint.load import load_model
from iwm_fast.engine.checkpoint.writer import CheckpointWriter
from iwm_fast.engine.distributed.rank_info import RankInfo
from iwm_fast.engine.distributed.ranks import Ranks
from iwm_fast.engine.resuming import require_alike_lists, same_place
from iwm_fast.engine.run_directory import RunDirectory
from iwm_fast.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_images):
    """Train a run of two steps on the images under here/images; each test resumes a copy of it."""
    home = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_images, home / "here/images")
    pretrain(small_config(home / "here/images", train__steps=2, checkpoint__every_steps=1), home / "run")
    return home / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_the_same_images_elsewhere_resume_and_are_recorded(run, copy, tiny_images, tmp_path, capfd):
    shutil.copytree(tiny_images, tmp_path / "there")
    pretrain(small_config(tmp_path / "there", train__steps=3), copy, "auto")
    said = capfd.readouterr().err
    assert f"data.root was {run.parent / 'here/images'} and is {tmp_path / 'there'} now: the same 24 samples" in said
    assert [record["step"] for record in metrics(copy)] == [1, 2, 3]
    assert RunDirectory(copy).recorded().data.root == str(tmp_path / "there")
    straight = tmp_path / "straight"
    pretrain(small_config(tiny_images, train__steps=3), straight)
    assert losses(copy) == losses(straight)


def test_other_images_elsewhere_are_refused_in_one_line_and_the_run_stays_as_it_was(run, copy, tmp_path):
    other = shutil.copytree(run.parent / "here/images", tmp_path / "there")
    (other / "warm/000.jpg").rename(other / "warm/0.jpg")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"other data \(other names, first at warm/0\.jpg\): give the same") as caught:
        pretrain(small_config(other, train__steps=3), copy, "auto")
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: text for path, text in before.items() if path.name != ".lock"
    }


def test_a_checkpoint_without_the_list_resumes_under_its_own_root_only(run, copy, tiny_images, monkeypatch):
    plain = Checkpoint.__init__

    def forgetting(saved, path):
        plain(saved, path)
        saved.index.pop("data", None)

    monkeypatch.setattr(Checkpoint, "__init__", forgetting)
    with pytest.raises(UserError, match="of a version that did not record its data: resume with"):
        pretrain(small_config(tiny_images, train__steps=3), copy, "auto")
    pretrain(small_config(f"{run.parent}/here/./images/", train__steps=3), copy, "auto")
    assert len(metrics(copy)) == 3


# Of 24 samples, seed 3, epoch 0.
EARLIER_ORDER = [4, 17, 20, 18, 11, 13, 8, 14, 23, 3, 12, 9, 0, 5, 6, 21, 22, 2, 16, 19, 15, 1, 7, 10]


class Earlier:
    """A version before orders had names: it knew one, and its checkpoints have no word of it."""

    def __init__(self, monkeypatch):
        self._patches = monkeypatch

    def __enter__(self):
        plain = CheckpointWriter.save

        def save(writer, step, fragments, meta, shapes):
            meta.pop("order")
            plain(writer, step, fragments, meta, shapes)

        self._patches.setattr(resuming, "FEISTEL", SORTED)
        self._patches.setattr(CheckpointWriter, "save", save)

    def __exit__(self, *_):
        self._patches.undo()


def test_a_run_begun_with_the_earlier_order_finishes_in_it(tiny_images, tmp_path, monkeypatch):
    seen = []
    plain = TrainingStream.__next__

    def noted(stream):
        batch = plain(stream)
        seen.extend(batch.ids.tolist())
        return batch

    with Earlier(monkeypatch):
        pretrain(small_config(tiny_images, train__steps=3), tmp_path / "straight")
        pretrain(small_config(tiny_images, train__steps=1), tmp_path / "run")
    assert "order" not in Checkpoint(tmp_path / "run/checkpoints/step_000001").index
    monkeypatch.setattr(TrainingStream, "__next__", noted)
    pretrain(small_config(tiny_images, train__steps=3), tmp_path / "run", "auto")
    assert seen == EARLIER_ORDER[8:]
    assert Checkpoint(tmp_path / "run/checkpoints/step_000003").index["order"] == SORTED
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    for key, tensor in state(tmp_path / "straight", 3).items():
        assert torch.equal(state(tmp_path / "run", 3)[key], tensor), key


def test_a_run_in_an_order_of_a_later_version_is_refused(copy, tiny_images, monkeypatch):
    plain = Checkpoint.__init__

    def later(saved, path):
        plain(saved, path)
        assert saved.index["order"] == FEISTEL
        saved.index["order"] = "spiral"

    monkeypatch.setattr(Checkpoint, "__init__", later)
    with pytest.raises(UserError, match=r"step_000002: its samples come in the order 'spiral', which this version"):
        pretrain(small_config(tiny_images, train__steps=3), copy, "auto")


@pytest.mark.slow
def test_images_mended_in_place_resume_with_a_line(copy, run, capfd):
    victim = run.parent / "here/images/cold/003.jpg"
    victim.write_bytes(victim.read_bytes() + b"\0")
    try:
        pretrain(small_config(run.parent / "here/images", train__steps=3), copy, "auto")
    finally:
        victim.write_bytes(victim.read_bytes()[:-1])
    said = capfd.readouterr().err
    assert "the data changed since the checkpoint was written: other sizes, first at cold/003.jpg" in said


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("photos", "photos/", True),
        ("photos", "./photos", True),
        ("/a/b/../photos", "/a/photos", True),
        ("photos", "photos2", False),
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3://bucket/a", "s3://bucket/b", False),
        ("s3://bucket/a", "a", False),
    ],
)
def test_a_place_is_the_same_however_it_is_written(one, other, same):
    assert same_place(small_config(one), small_config(other)) is same


def test_a_link_names_the_same_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert same_place(small_config(tmp_path / "a"), small_config(tmp_path / "b"))


FREE = {
    "train": {"steps": 7, "micro_batch": 2, "rank_timeout_s": 700.0, "max_skipped": 3, "activation_checkpointing": True,
              "compile": True, "target_stream": True, "static_shapes": True, "static_multiple": 64,
              "cuda_graph": True},
    "model": {"attention": "sdpa", "mlp_workspace_mib": 64},
    "zero": {"stage": 2},
    "data": {"root": "elsewhere", "source": "folder", "threads": 3, "readers": 2, "prefetch": 1, "wait_s": 9.0,
             "store_timeout": 3.0, "store_attempts": 2, "max_bad_fraction": 0.5},
    "checkpoint": {"every_steps": 7, "keep_last": 9, "keep_every": 5},
    "eval": {"every_steps": 7, "root": "photos", "images": 10, "mrr_images": 3, "bank": 16, "horizon": 2},
    "log": {"every_steps": 3, "tensorboard": False, "wandb": "x", "prometheus_port": 0, "straggler_ratio": 2.0},
}  # fmt: skip
KEPT = {
    "train": {"seed": 1, "epochs": 7.0, "schedule_steps": 7, "global_batch": 64, "precision": "fp32", "lr": 0.002,
              "optimizer": "lamb", "warmup": 3, "ema": (0.9, 1.0), "clip": 1.0},
    "data": {"device": "gpu", "max_pixels": 1000, "hw_decoder_load": 0.1, "order": "shard", "streams": 32,
             "shuffle_window": 100},
    "model": {"patch": 8, "target": "shared", "target_precision": "fp8", "normalize_target": False},
    "masks": {"target_blocks": 3},
    "actions": {"strength": 2.0},
    "views": {"sources_per_target": 2},
}  # fmt: skip


def changed(section, config=None, **values):
    config = config or Config()
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.fixture
def begun(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.begin(Config(), {})
    return directory


@pytest.mark.parametrize("section", FREE)
def test_what_cannot_change_the_training_may_differ(section, begun):
    begun.require_same(changed(section, **FREE[section]))


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in KEPT.items() for key in keys])
def test_what_can_change_the_training_is_refused_by_name(section, key, begun):
    with pytest.raises(UserError, match=rf": {section}\.{key} was .*leave CONFIG out"):
        begun.require_same(changed(section, **{key: KEPT[section][key]}))


@pytest.mark.parametrize("path", ["", "/", "/checkpoints", "/checkpoints/latest", "/checkpoints/step_000001/"])
def test_resume_takes_a_run_and_whatever_names_its_checkpoints(path, copy, run, monkeypatch):
    """An older checkpoint of the same run is where it resumes; later log lines are dropped."""
    monkeypatch.chdir(copy.parent)
    config = small_config(run.parent / "here/images", train__steps=2)
    chosen = resuming.choose_checkpoint(config, RunDirectory(copy), f"run{path}")
    assert chosen.name == ("step_000001" if "step" in path else "step_000002")


def test_resume_from_what_is_no_run_is_one_line(copy, run):
    config = small_config(run.parent / "here/images")
    with pytest.raises(UserError, match=r"--resume: latest: no run and no checkpoint; write auto, never, or the path"):
        resuming.choose_checkpoint(config, RunDirectory(copy), "latest")


def test_a_run_resumes_without_its_configuration_and_with_overrides_on_top(copy, capfd):
    assert main(["pretrain", "train.steps=3", "log.every_steps=3", "--out", str(copy), "--resume", "auto"]) == 0
    assert [record["step"] for record in metrics(copy)] == [1, 2, 3]
    assert RunDirectory(copy).recorded().log.every_steps == 3
    assert main(["pretrain", "--out", str(copy), "--resume", "auto"]) == 0
    assert "nothing to do: 3 steps are done" in capfd.readouterr().err
    assert main(["pretrain", "train.lr=1", "--out", str(copy), "--resume", "auto"]) == 2
    assert "config.yaml: train.lr was 0.002" in capfd.readouterr().err


@pytest.mark.slow
def test_another_folder_resumes_with_the_configuration_of_the_run_that_is_named(copy, tmp_path):
    new = tmp_path / "new"
    assert (
        main(["pretrain", "train.steps=3", "--out", str(new), "--resume", str(copy / "checkpoints/step_000001")]) == 0
    )
    assert [record["step"] for record in metrics(new)] == [2, 3]


def test_ranks_that_list_other_files_are_refused_by_host(tiny_images, monkeypatch):
    infos = tuple(RankInfo(rank, host, 1, "gloo", "cpu", 0, 1, {}) for rank, host in enumerate(("alpha", "beta")))
    ranks = Ranks(0, 2, 0, 1, None, infos=infos)
    images = list_images(tiny_images)
    for answer, words in (((23, "x"), "lists 23 samples below data.root, rank 0 on alpha 24: "), ((24, "x"), "others")):
        monkeypatch.setattr(resuming, "gather", lambda mine, *_, answer=answer: [mine, answer])
        with pytest.raises(UserError, match=f"rank 1 on beta .*{words}"):
            require_alike_lists(images, ranks)
    monkeypatch.setattr(resuming, "gather", lambda mine, *_: [mine, mine])
    require_alike_lists(images, ranks)


def test_another_run_is_not_resumed_over_a_run_that_has_checkpoints(copy, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = small_config(run.parent / "here/images", train__steps=2)
    with pytest.raises(UserError, match=r"--resume: .*other is another run, and .*run has checkpoints already: resume"):
        resuming.choose_checkpoint(config, RunDirectory(copy), str(other))
    shutil.rmtree(copy / "checkpoints")
    assert resuming.choose_checkpoint(config, RunDirectory(copy), str(other)).name == "step_000002"


def test_schedules_keep_their_length_where_images_come_or_go(tiny_images, tmp_path, capfd):
    """Twice the images: epochs of them would be twice as many steps, and the learning rate would rise again."""
    shutil.copytree(tiny_images, tmp_path / "images")
    length = {"train__schedule_steps": None, "train__epochs": 2, "train__warmup": 0}
    whole = small_config(tmp_path / "images", train__steps=None, **length)
    pretrain(whole, tmp_path / "whole")
    steps = len(metrics(tmp_path / "whole"))
    pretrain(small_config(tmp_path / "images", train__steps=steps - 2, **length), tmp_path / "run")
    for path in sorted((tmp_path / "images").rglob("*.jpg")):
        shutil.copy(path, path.with_name(f"more_{path.name}"))
    for stop in (steps - 1, None):  # the second time its own checkpoint knows
        pretrain(small_config(tmp_path / "images", train__steps=stop, **length), tmp_path / "run", "auto")
        assert f"the schedules keep their {steps} steps, train.epochs 2 of the 24 images" in capfd.readouterr().err
    rates = [[record["lr"] for record in metrics(tmp_path / run)] for run in ("run", "whole")]
    assert rates[0] == rates[1]


def test_a_new_run_has_the_checkpoint_that_it_resumes_before_one_of_its_own(copy, run, tmp_path):
    """As a run that is stopped before its first checkpoint: it resumes from itself, also where the other is gone."""
    new = tmp_path / "new"
    pretrain(small_config(run.parent / "here/images", train__steps=2), new, str(copy))
    shutil.rmtree(copy)
    assert load_model(new)[3] == 2
    pretrain(small_config(run.parent / "here/images", train__steps=3), new, "auto")
    assert [record["step"] for record in metrics(new)] == [3]


@pytest.mark.parametrize(("key", "value"), {"optimizer": "lamb", "global_batch": 64, "lr": 0.5, "seed": 9}.items())
def test_a_new_run_has_the_training_keys_of_the_checkpoint_that_it_resumes(key, value, copy, run, tmp_path):
    config = changed("train", small_config(run.parent / "here/images", train__steps=2), **{key: value})
    with pytest.raises(UserError, match=rf"run/config\.yaml: train\.{key} was .* model\.init=.*run\)"):
        resuming.choose_checkpoint(config, RunDirectory(tmp_path / "new"), str(copy))


def test_a_new_run_may_have_other_masks_than_the_run_that_it_resumes(copy, run, tmp_path):
    config = changed("masks", small_config(run.parent / "here/images", train__steps=2), target_blocks=3)
    chosen = resuming.choose_checkpoint(config, RunDirectory(tmp_path / "new"), str(copy))
    assert chosen.name == "step_000002"


def test_settings_that_cannot_be_compared_are_said(copy, run, capfd):
    (copy / "config.yaml").unlink()
    config = small_config(run.parent / "here/images", train__steps=2)
    assert resuming.choose_checkpoint(config, RunDirectory(copy), "auto").name == "step_000002"
    assert "config.yaml: is missing, so the given settings are used" in capfd.readouterr().err


def test_a_training_with_a_regulariser_resumes_bit_for_bit(tiny_images, tmp_path):
    """Its directions are of the seed and the step, so nothing of it is in a checkpoint."""
    kind = {"model__regularizer__kind": "sigreg", "model__target": "shared"}
    pretrain(small_config(tiny_images, train__steps=4, **kind), tmp_path / "straight")
    pretrain(small_config(tiny_images, train__steps=2, **kind), tmp_path / "halves")
    pretrain(small_config(tiny_images, train__steps=4, **kind), tmp_path / "halves", "auto")
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    found, expected = state(tmp_path / "halves", 4), state(tmp_path / "straight", 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_regulariser_over_accumulated_micro_batches_is_refused_in_one_line(tiny_images, tmp_path, micro_batch):
    changes = {"model__regularizer__kind": "sigreg", "train__micro_batch": micro_batch}
    with pytest.raises(UserError, match=rf"micro-batches of {micro_batch}: set train.micro_batch=") as caught:
        pretrain(small_config(tiny_images, train__steps=1, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
