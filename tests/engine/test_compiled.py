"""Training with compiled regions, and settings that cannot be combined with them."""

import shutil

import pytest
from small_run import losses, small_config

from iwm_fast.engine import pretrain
from iwm_fast.engine import step as loop
from iwm_fast.errors import UserError
from iwm_fast.models.compiled_regions import compilations


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_losses_are_the_plain_ones_and_no_batch_after_the_tenth_compiles(tiny_images, tmp_path, monkeypatch):
    lengths, graphs = [], []
    forward, train_step = loop.Trainer._forward, loop.Trainer.train_step

    def seen(trainer, batch):
        lengths.append((int(batch.patches.context_lengths.sum()), int(batch.patches.target_lengths.sum())))
        return forward(trainer, batch)

    def step(trainer):
        record = train_step(trainer)
        graphs.append(compilations())
        return record

    # 64 patches, so that hardly two batches have the same number of tokens.
    steps = {"train__steps": 52, "train__epochs": 20.0, "train__schedule_steps": 52, "model__patch": 4}
    pretrain(small_config(tiny_images, **steps), tmp_path / "plain")
    monkeypatch.setattr(loop.Trainer, "_forward", seen)
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    before = compilations()
    pretrain(small_config(tiny_images, **steps, train__compile=True), tmp_path / "compiled")
    # fp32 differs in its last bits from the first step, and AdamW carries that along.
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert len(set(lengths)) >= 40
    # Encoder and predictor have one width here and share code.
    assert graphs[9] - before == 9
    assert graphs[-1] == graphs[9]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__target_stream": True}, "train.target_stream needs a GPU; this rank computes on cpu"),
        ({"train__compile": True}, r"train.compile needs a C\+\+ compiler on a CPU"),
    ],
    ids=["target_stream", "compile"],
)
def test_what_the_machine_lacks_is_named(tiny_images, tmp_path, monkeypatch, changes, line):
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(UserError, match=line):
        pretrain(small_config(tiny_images, **changes), tmp_path / "run")
