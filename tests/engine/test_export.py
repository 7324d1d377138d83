"""What a run hands on: the model that was trained, in files that others read."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import small_config, state

from iwm_fast.engine import export_run, load_model, onnx_export, pretrain
from iwm_fast.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    pretrain(small_config(tiny_images, train__steps=3, zero__stage=3), out)
    return out


def test_the_loaded_model_has_the_checkpoint_s_weights_and_the_average_as_its_target(run):
    model, _, space, step = load_model(run)
    saved = state(run, 3)
    assert (step, space.dim) == (3, model.action_dim)
    for name, parameter in model.named_parameters():
        kind = "ema" if name.startswith("target_encoder.") else "weight"
        assert torch.equal(parameter, saved[f"{kind}/{name}"])
    assert not model.training


def test_the_export_loads_by_itself_and_computes_the_same(run, tmp_path):
    written = export_run(run, tmp_path / "weights")
    model, *_ = load_model(run)
    described = json.loads((written / "config.json").read_text())
    assert described["schema"] == "iwm-fast-export/1"
    for part in ("encoder", "target_encoder", "predictor"):
        ours = getattr(model, part).state_dict()
        theirs = load_file(written / f"{part}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    timm = load_file(written / "encoder_timm.safetensors")
    assert torch.equal(timm["blocks.0.mlp.fc1.weight"], model.target_encoder.blocks[0].mlp.w_in)
    assert timm["pos_embed"].shape == (1, 16, 32)


def test_an_existing_folder_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_run(run, tmp_path / "there")
    with pytest.raises(UserError, match="not a run"):
        export_run(tmp_path / "there", tmp_path / "out")


def test_a_checkpoint_that_is_not_there_is_named(run):
    with pytest.raises(UserError, match="step_000099"):
        load_model(run, "step_000099")


def test_onnx_graphs_compute_what_the_networks_do_for_batches_of_any_size(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra onnx)")
    written = export_run(run, tmp_path / "weights", onnx=True)
    model, *_ = load_model(run)
    described = json.loads((written / "config.json").read_text())["onnx"]
    parts = {"encoder": "context", "target_encoder": "target"}
    assert {described[part] for part in (*parts, "predictor")} == {p.name for p in written.glob("*.onnx")}
    sessions = {
        part: runtime.InferenceSession(written / described[part], providers=["CPUExecutionProvider"])
        for part in (*parts, "predictor")
    }
    for batch in (1, 5):
        images = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8)
        action = torch.randn(batch, model.action_dim)
        with torch.no_grad():
            for part, which in parts.items():
                want = model.encode(images, which).numpy()
                (found,) = sessions[part].run(None, {"images": images.numpy()})
                # fp32 rounded in another order, as engine/onnx_export says, of numbers up to the largest
                np.testing.assert_allclose(found, want, atol=1e-5 * abs(want).max(), rtol=0)
            z = model.encode(images)
            want = model.predict(z, action).numpy()
            (found,) = sessions["predictor"].run(None, {"tokens": z.numpy(), "action": action.numpy()})
            np.testing.assert_allclose(found, want, atol=1e-5 * abs(want).max(), rtol=0)


def test_a_graph_that_differs_is_refused_and_leaves_no_export(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra onnx)")
    answer = onnx_export._run
    monkeypatch.setattr(onnx_export, "_run", lambda *words: answer(*words) + 1e-3)
    with pytest.raises(UserError, match=r"encoder\.onnx: the graph differs from the network"):
        export_run(run, tmp_path / "weights", onnx=True)
    assert not (tmp_path / "weights").exists()


def test_without_the_packages_onnx_names_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"--onnx needs onnxruntime, which is not installed: pip install"):
        export_run(run, tmp_path / "weights", onnx=True)
    assert list(tmp_path.iterdir()) == []


TIMM = """
import importlib.util, json, re, sys
from pathlib import Path
import torch

# PyPI's torchvision cannot load its detection operators beside a CPU build of torch, and then refuses to be imported.
# Their names are declared here, so that timm finds torchvision's transforms; a vision transformer calls none of them.
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    root = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    text = (root / "_meta_registrations.py").read_text()
    for name in set(re.findall(r'register_meta\\("(\\w+)"\\)|torchvision::(\\w+)', text)):
        torch.library.define(f"torchvision::{name[0] or name[1]}", "(Tensor x) -> Tensor")

from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

folder = Path(sys.argv[1])
arguments = json.loads((folder / "config.json").read_text())["timm"]
cfg = arguments.pop("pretrained_cfg")
network = VisionTransformer(**arguments, norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=cfg["norm_eps"]))
network.load_state_dict(load_file(folder / "encoder_timm.safetensors"), strict=True)
images = load_file(sys.argv[2])["images"].permute(0, 3, 1, 2).float() / 255
mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    features = network.eval().forward_features((images - mean) / std)
save_file({"features": features.contiguous()}, sys.argv[3])
"""


def test_timm_s_vision_transformer_gives_the_same_features(run, tmp_path):
    """The real timm, in a process of its own: nothing of it or of torchvision enters this one."""
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm and torchvision are not installed (extra test)")
    written = export_run(run, tmp_path / "weights")
    model, *_ = load_model(run)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images.safetensors")
    (tmp_path / "theirs.py").write_text(TIMM)
    words = [tmp_path / "theirs.py", written, tmp_path / "images.safetensors", tmp_path / "features.safetensors"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "features.safetensors")["features"]
    with torch.no_grad():
        want = model.encode(images, "target")
    # Two orders of fp32 sums through two blocks, of features of size 1.
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
