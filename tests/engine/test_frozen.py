"""A frozen target and a frozen encoder: what trains, what a checkpoint holds, and what a run no longer needs."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from launched import on_ranks
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_run import losses, metrics, small_config, state

from iwm_fast.api import load_world
from iwm_fast.engine import load_model, pretrain
from iwm_fast.engine.checkpoint.format import damage
from iwm_fast.engine.checkpoint.frozen_file import FROZEN_FILE
from iwm_fast.engine.metrics.collapse import CollapseWatch
from iwm_fast.errors import UserError
from iwm_fast.eval.finetune.modes import reader_builder
from iwm_fast.eval.online import OnlineEvaluator, join_shares, measure_share
from iwm_fast.eval.stats import evenly_spaced
from iwm_fast.eval.world_model.bank import make_bank
from iwm_fast.eval.world_model.given_images import read_files
from iwm_fast.eval.world_model.mrr import mean_reciprocal_rank
from iwm_fast.eval.world_model.rollout import evaluate_rollouts
from iwm_fast.export.weights import export_run
from iwm_fast.models.iwm import IWM
from iwm_fast.models.task_model import HeadShape

WIDE = {"depth": 1, "width": 48, "heads": 3}
KINDS = ("target", "encoder", "both")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def teachers(tiny_images, tmp_path_factory):
    """A run of the small configuration, and one whose encoder is wider and shallower."""
    home = tmp_path_factory.mktemp("teachers")
    pretrain(small_config(tiny_images, train__steps=2), home / "same")
    pretrain(small_config(tiny_images, train__steps=2, model__encoder=WIDE), home / "wide")
    return home


def changes(kind, teachers):
    """What freezes a wide target, an encoder that is its own target, or an encoder beside a wide target."""
    target = {"model__target": "frozen", "model__target_init": str(teachers / "wide")}
    target |= {"model__target_encoder": {"encoder": WIDE}}
    encoder = {"model__freeze_encoder": True, "model__init": str(teachers / "same")}
    return {"target": target, "encoder": encoder | {"model__target": "shared"}, "both": target | encoder}[kind]


@pytest.fixture(scope="module")
def run(teachers, tiny_images, tmp_path_factory):
    """Two steps against a wide frozen target, under bf16 at stage 1, each measured."""
    out = tmp_path_factory.mktemp("frozen") / "run"
    measured = {"eval__every_steps": 1, "eval__root": str(tiny_images), "eval__mrr_images": 2, "eval__bank": 8}
    divided = {"zero__stage": 1, "train__precision": "bf16", "checkpoint__every_steps": 1}
    config = small_config(tiny_images, train__steps=2, **changes("target", teachers), **divided, **measured)
    pretrain(config, out, evaluator=OnlineEvaluator())
    return out


def everywhere(quick):
    """Every kind at every stage; all but `quick` are slow."""
    both = [(kind, stage) for kind in KINDS for stage in range(4)]
    return [pytest.param(*one, marks=() if one == quick else SLOW, id=f"{one[0]} at stage {one[1]}") for one in both]


@pytest.mark.parametrize(("kind", "stage"), everywhere(("target", 0)))
def test_halves_equal_the_whole_bit_for_bit_after_the_source_is_gone(teachers, tiny_images, tmp_path, kind, stage):
    own = shutil.copytree(teachers, tmp_path / "own")
    given = changes(kind, own) | {"zero__stage": stage, "train__precision": "bf16" if stage % 2 == 0 else "fp32"}
    pretrain(small_config(tiny_images, train__steps=4, **given), tmp_path / "straight")
    pretrain(small_config(tiny_images, train__steps=2, **given), tmp_path / "halves")
    shutil.rmtree(own)
    pretrain(small_config(tiny_images, train__steps=4, **given), tmp_path / "halves", resume="auto")
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")
    straight, halves = state(tmp_path / "straight", 4), state(tmp_path / "halves", 4)
    assert straight.keys() == halves.keys()
    assert all(torch.equal(straight[key], halves[key]) for key in straight)
    held = {key.split("/")[1].split(".")[0] for key in straight}
    assert held == ({"encoder", "predictor"} if kind == "target" else {"predictor"})
    assert {record["ema_momentum"] for record in metrics(tmp_path / "straight")} == {None}


OPTIONS = {
    "recomputation": {"train__activation_checkpointing": True},
    "compiled": {"train__compile": True},
    "static shapes": {"train__static_shapes": True},
    "micro-batches": {"train__micro_batch": 2, "zero__stage": 2},
}
OTHERS = {
    "bf16": ({"train__precision": "bf16"}, 0.05),
    "fp8": ({"model__target_precision": "fp8"}, 0.05),
}


@SLOW
@pytest.mark.parametrize("option", [*OPTIONS, *OTHERS])
@pytest.mark.parametrize("kind", KINDS)
def test_options_of_the_step_change_frozen_parts_as_little_as_trained_ones(
    teachers, tiny_images, tmp_path, kind, option
):
    """fp8 needs a target of its own, and differs from fp32 as in training with an EMA."""
    if (kind, option) == ("encoder", "fp8"):
        with pytest.raises(ValidationError, match="target must be ema or frozen"):
            small_config(tiny_images, **changes(kind, teachers), **OTHERS[option][0])
        return
    given, rel = (OPTIONS[option], 1e-4) if option in OPTIONS else OTHERS[option]
    pretrain(small_config(tiny_images, train__steps=4, **changes(kind, teachers)), tmp_path / "plain")
    pretrain(small_config(tiny_images, train__steps=4, **changes(kind, teachers), **given), tmp_path / "other")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=rel)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [True, False], ids=["several sources", "mlp predictor"])
def test_other_predictors_and_several_sources_train_too(teachers, tiny_images, tmp_path, kind, several):
    shape = {"depth": 1, "width": 24, "heads": 2, "kind": "mlp", "conditioning": "block"}
    given = {"views__sources_per_target": 2} if several else {"model__predictor": shape}
    pretrain(small_config(tiny_images, train__steps=3, **changes(kind, teachers), **given), tmp_path / "run")
    assert len(set(losses(tmp_path / "run"))) == 3


@SLOW
def test_a_checkpoint_of_one_stage_resumes_as_another(teachers, tiny_images, tmp_path):
    given = changes("both", teachers)
    pretrain(small_config(tiny_images, train__steps=8, **given), tmp_path / "straight")
    for first, then in ((0, 3), (3, 2), (1, 0)):
        out = tmp_path / f"from{first}to{then}"
        pretrain(small_config(tiny_images, train__steps=4, zero__stage=first, **given), out)
        pretrain(small_config(tiny_images, train__steps=8, zero__stage=then, **given), out, resume="auto")
        assert losses(out) == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)


@pytest.fixture(scope="module")
def ranks(teachers, tiny_images, tmp_path_factory):
    """One rank's run of each kind, two ranks' at each stage, and halves on two ranks, then one."""
    out = tmp_path_factory.mktemp("ranks")
    jobs = []
    for kind in KINDS:
        given = changes(kind, teachers) | {"train__steps": 6}
        pretrain(small_config(tiny_images, **given), out / kind)
        jobs += [{"name": f"{kind}_{stage}", "zero__stage": stage, **given} for stage in range(4)]
        halves = {"name": f"halves_{kind}", "zero__stage": 1, **given}
        jobs += [halves | {"train__steps": 3}, halves | {"resume": "auto"}]
        jobs.append({"name": f"then_one_{kind}", "zero__stage": 3, **given, "train__steps": 3})
    on_ranks(2, tiny_images, out, jobs)
    for kind in KINDS:
        given = changes(kind, teachers) | {"train__steps": 6}
        pretrain(small_config(tiny_images, **given), out / f"then_one_{kind}", resume="auto")
    return out


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_follow_one_and_resume_bit_for_bit(ranks, kind):
    for other in (*(f"{kind}_{stage}" for stage in range(4)), f"then_one_{kind}"):
        assert losses(ranks / other) == pytest.approx(losses(ranks / kind), rel=1e-4), other
    norms = [[record["grad_norm"] for record in metrics(ranks / name)] for name in (kind, f"{kind}_2")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert losses(ranks / f"halves_{kind}") == losses(ranks / f"{kind}_1")
    halves, whole = state(ranks / f"halves_{kind}", 6), state(ranks / f"{kind}_1", 6)
    assert all(torch.equal(halves[key], whole[key]) for key in whole)


def test_the_teacher_s_ema_is_the_target_exactly_and_the_encoder_moves(run, teachers, tiny_images):
    model, config, _, _ = load_model(run)
    taught = load_model(teachers / "wide")[0].target_encoder.state_dict()
    found = model.target_encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in taught.items())
    assert load_file(run / "checkpoints" / FROZEN_FILE).keys() == {f"target_encoder.{name}" for name in taught}
    torch.manual_seed(config.train.seed)
    begun = IWM(config.model, model.action_dim)
    assert not torch.equal(begun.encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    # The seed gives encoder and predictor the weights that they have with another target.
    torch.manual_seed(config.train.seed)
    plain = IWM(small_config(tiny_images).model, model.action_dim)
    for part in ("encoder", "predictor.blocks"):
        ours, theirs = (one.get_submodule(part).state_dict() for one in (begun, plain))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_frozen_encoder_stays_and_the_predictor_moves(teachers, tiny_images, tmp_path):
    pretrain(small_config(tiny_images, train__steps=1, **changes("encoder", teachers)), tmp_path / "run")
    model, config, _, _ = load_model(tmp_path / "run")
    given = load_model(teachers / "same")[0].target_encoder.state_dict()
    assert all(torch.equal(model.encoder.state_dict()[name], tensor) for name, tensor in given.items())
    torch.manual_seed(config.train.seed)
    begun = IWM(config.model, model.action_dim).predictor.state_dict()
    moved = [not torch.equal(begun[name], tensor) for name, tensor in model.predictor.state_dict().items()]
    assert sum(moved) > len(moved) / 2


def test_evaluation_while_training_reads_the_exact_weights_of_the_target(run, tiny_images):
    """Not the bf16 copies that the step reads."""
    model, config, space, _ = load_model(run)
    again = join_shares([measure_share(model, config, space, tiny_images)], config.eval.bank)
    assert {key: metrics(run)[1][key] for key in again} == pytest.approx(again)


def test_a_checkpoint_whose_frozen_weights_changed_or_went_is_damaged_and_names_them(
    run, teachers, tiny_images, tmp_path
):
    copy = shutil.copytree(run, tmp_path / "run")
    file, last = copy / "checkpoints" / FROZEN_FILE, copy / "checkpoints" / "step_000002"
    assert damage(last) is None
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    assert (
        damage(last)
        == f"{file}: its frozen weights are not those that were written (SHA-256 differs); restore that file"
    )
    file.unlink()
    assert damage(last) == f"{file}: its frozen weights are missing; restore that file"
    with pytest.raises(UserError, match=f"no whole checkpoint is left .*{FROZEN_FILE}: its frozen weights are missing"):
        load_model(copy)


def test_a_new_run_that_resumes_another_s_checkpoint_has_the_frozen_weights_itself(run, tiny_images, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    config = load_model(run)[1]
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    pretrain(more, tmp_path / "run", resume=str(other), evaluator=OnlineEvaluator())
    shutil.rmtree(other)
    assert load_model(tmp_path / "run")[3] == 3


@SLOW
def test_an_export_holds_the_frozen_target_and_is_a_teacher_too(run, teachers, tiny_images, tmp_path):
    exported = export_run(run, tmp_path / "export")
    given = {"model__target": "frozen", "model__target_init": str(exported)}
    pretrain(small_config(tiny_images, train__steps=1, **given), tmp_path / "taught")
    found, student = load_model(tmp_path / "taught")[0].target_encoder, load_model(run)[0].encoder
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in student.state_dict().items())


def test_an_export_and_its_run_are_the_same_world_whose_predictions_have_the_target_s_width(run, tiny_images, tmp_path):
    worlds = [load_world(run), load_world(export_run(run, tmp_path / "export"))]
    picture = worlds[0].read(sorted(tiny_images.rglob("*.jpg"))[:1])
    answers = [
        (one.encode(picture), one.encode(picture, "target"), one.predict(picture, {"hue": 5.0})) for one in worlds
    ]
    assert [tuple(tensor.shape) for tensor in answers[0]] == [(1, 16, 32), (1, 16, 48), (1, 16, 48)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*answers, strict=True))
    found = worlds[0].rank(picture, {"hue": 5.0}, picture.expand(2, -1, -1, -1))
    assert found.order.shape == (1, 2)


@pytest.mark.parametrize("mode", ["linear", "predictor", "end-to-end"])
def test_heads_read_the_encoder_s_width_or_that_of_predictions(run, tiny_images, mode):
    model, config, _, _ = load_model(run)
    reader = reader_builder(
        model, mode, "pretrained", {"a": HeadShape(3, dense=False)}, config.model.evaluated_encoder
    )()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert reader(images, "a").shape == (2, 3)
    assert sum(p.numel() for p in reader.parameters() if p.requires_grad) > 0


def test_there_is_no_roll_out_in_the_space_of_a_frozen_target(run):
    subject = SimpleNamespace(config=load_model(run)[1])
    said = evaluate_rollouts(subject)["not_run"]["rollout"]
    assert said == "predictions are in the frozen target's space, and the predictor reads the encoder's"


def test_without_a_predictor_the_source_is_ranked_as_the_frozen_target_sees_it(run, tiny_images):
    """A bank of clean views: the target's tokens of the source are one of them, whatever the encoder's are."""
    model, config, space, _ = load_model(run)
    picture = read_files(sorted(tiny_images.rglob("*.jpg"))[:1], 32)
    found = mean_reciprocal_rank(model, config, space, picture, bank=8, queries=2)
    own = model.targets(picture).float().flatten()
    bank = make_bank(config.actions, space, 0, 8)
    views = torch.stack([model.targets(view[None]).float().flatten() for view in bank.targets(picture[0])])
    far = (views - own).norm(dim=1)
    expected = [int((far < far[query]).sum()) + 1 for query in evenly_spaced(2, 8)]
    assert found.ranks["l2"]["bypass"][0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_cannot_move_is_never_said_to_collapse(tiny_images, tmp_path, kind):
    flat = {"step": 3, "rank_me": 1.0, "energy_mean": 0.99, "loss": 0.1}
    assert CollapseWatch(small_config(tiny_images)).look(flat) is not None
    assert CollapseWatch(small_config(tiny_images, **changes(kind, tmp_path))).look(flat) is None


FAULTS = {
    "a path that is not there": ({"model__target_init": "gone"}, r"model\.target_init: gone: no such file or folder"),
    "another architecture": (
        {"model__target_encoder": None},
        (
            r"wide: norm\.weight is 48 there and 32 in the configuration: "
            r"set 'model\.target_encoder=\{encoder: \{depth: 1, width: 48, heads: 3\}\}'$"
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_teacher_that_cannot_be_used_is_one_line_and_leaves_no_checkpoint(teachers, tiny_images, tmp_path, fault):
    given, line = FAULTS[fault]
    with pytest.raises(UserError, match=line) as caught:
        pretrain(small_config(tiny_images, train__steps=1, **(changes("target", teachers) | given)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_teacher_with_a_weight_that_is_no_number_is_refused(teachers, tiny_images, tmp_path):
    exported = export_run(teachers / "wide", tmp_path / "export")
    file = exported / "target_encoder.safetensors"
    weights = load_file(file)
    weights["norm.bias"][3] = float("nan")
    save_file(weights, file)
    given = changes("target", teachers) | {"model__target_init": str(exported)}
    with pytest.raises(UserError, match=r"model\.target_init: .*export: norm\.bias has numbers that are not finite"):
        pretrain(small_config(tiny_images, train__steps=1, **given), tmp_path / "run")
