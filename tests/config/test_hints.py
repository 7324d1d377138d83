import pytest
from typer.main import get_command

from iwm_fast.cli.main import app
from iwm_fast.config.hints import _HINTS, hint_of
from iwm_fast.config.schema_table import rows


def options(command):
    inside = getattr(command, "commands", {})
    own = {name for parameter in command.params for name in parameter.opts}
    return own.union(*(options(one) for one in inside.values()))


def test_every_hint_leads_to_a_key_or_an_option_that_there_is():
    keys, known = {row.key for row in rows()}, options(get_command(app))
    hints = set(_HINTS.values())
    assert [key for hint in hints for key in hint.keys if key not in keys] == []
    assert [option for hint in hints for option in hint.options if option not in known] == []
    assert all(hint.keys or hint.options or hint.note for hint in hints)


WORDS = {
    "batch_size": "train.global_batch",
    "bs": "train.global_batch",
    "total_batch_size": "train.global_batch",
    "per_device_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "learning_rate": "train.lr",
    "num_workers": "data.threads",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.schedule_steps",
    "weight-decay-end": "train.weight_decay",
    "fp16": "train.precision",
    "amp": "train.precision",
    "img_size": "model.image",
    "resolution": "model.image",
    "patch_size": "model.patch",
    "embed_dim": "model.encoder.width",
    "depth": "model.encoder.depth",
    "num_heads": "model.encoder.heads",
    "arch": "model.encoder",
    "backbone": "model.encoder",
    "dataset": "data.root",
    "data_dir": "data.root",
    "ema_decay": "train.ema",
    "teacher_momentum": "train.ema",
    "max_grad_norm": "train.clip",
    "log_interval": "log.every_steps",
    "save_every": "checkpoint.every_steps",
    "wandb_project": "log.wandb",
    "random_seed": "train.seed",
    "deepspeed": "zero.stage",
    "warmup_epochs": "train.warmup_epochs",
    "warmup_steps": "train.warmup",
    "pct_start": "train.warmup_ratio",
    "check_val_every_n_epoch": "eval.every_epochs",
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_another_framework_leads_to_our_key(word):
    hint = hint_of(word)
    assert hint is not None
    assert hint.keys[0] == WORDS[word]


@pytest.mark.parametrize("word", ["--Batch-Size", "batchSize", "training.BATCH_SIZE", "batchsize"])
def test_spelling_and_section_do_not_matter(word):
    assert hint_of(word) == hint_of("batch_size")


@pytest.mark.parametrize("word", ["output_dir", "save_dir", "log_dir"])
def test_the_run_s_folder_is_an_option(word):
    assert hint_of(word).options == ("--out",)


def test_an_unknown_word_has_no_hint():
    assert hint_of("frobnicate") is None
