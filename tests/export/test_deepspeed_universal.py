"""DeepSpeed's own loader reads the universal export, at each stage that has one."""

import pytest
import torch
from small_run import small_config, state

from iwm_fast.actions.space import ActionSpace
from iwm_fast.engine import pretrain, zero
from iwm_fast.engine.distributed.ranks import start
from iwm_fast.export.deepspeed_universal import export_universal
from iwm_fast.models.iwm import IWM


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_deepspeed_loads_the_universal_layout(stage, precision, tiny_images, tmp_path, monkeypatch):
    pretrain(small_config(tiny_images, train__steps=3), tmp_path / "run")
    out = export_universal(tmp_path / "run", tmp_path / "universal")
    plain = zero.deepspeed_config
    monkeypatch.setattr(zero, "deepspeed_config", lambda *a: plain(*a) | {"checkpoint": {"load_universal": True}})
    config = small_config(tiny_images, zero__stage=stage, train__precision=precision, train__seed=99)
    start()
    torch.manual_seed(99)
    model = IWM(config.model, ActionSpace(config.actions.groups, config.actions.form).dim)
    loaded = zero.initialize(model, config, 8, 1)
    loaded.engine.load_checkpoint(str(out))
    expected = state(tmp_path / "run", 3)
    shards = zero._shards(loaded, {s.name: s.shape for s in loaded.shards})
    assert {s.name for s in shards} == {key.removeprefix("weight/") for key in expected if key.startswith("weight/")}
    for shard in shards:
        part = slice(shard.start, shard.stop)
        assert torch.equal(shard.weight, expected[f"weight/{shard.name}"].flatten()[part]), shard.name
        for key, moment in shard.moments.items():
            assert torch.equal(moment, expected[f"{key}/{shard.name}"].flatten()[part]), (key, shard.name)
    assert loaded.engine.global_steps == 3
    module = torch.load(out / "global_step3/mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert all(
        torch.equal(module[key.removeprefix("ema/")], expected[key]) for key in expected if key.startswith("ema/")
    )
