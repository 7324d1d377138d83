"""Exports of a run: the trained model, in files that other tools read."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_libraries import TORCHVISION, require_libraries
from safetensors.torch import load_file, save_file
from small_run import small_config, state
from worlds import tiny_config, tiny_model

from iwm_fast.data.bad_samples import BadSamples
from iwm_fast.engine import load_model, pretrain
from iwm_fast.engine.checkpoint.shard_file import write_tensors
from iwm_fast.errors import UserError
from iwm_fast.eval.features import default_encoder
from iwm_fast.eval.finetune.modes import reader_builder
from iwm_fast.eval.finetune.saved import save_finetuned
from iwm_fast.eval.world_model.given_images import read_files
from iwm_fast.export import iwm_format
from iwm_fast.export import onnx as onnx_export
from iwm_fast.export.deepspeed_universal import export_universal
from iwm_fast.export.described import Trained
from iwm_fast.export.weights import export_run
from iwm_fast.models.task_model import HeadShape
from iwm_fast.results import write_result


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    pretrain(small_config(tiny_images, train__steps=3, zero__stage=3), out)
    return out


def test_the_loaded_model_has_the_checkpoint_s_weights_and_the_ema_as_its_target(run):
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
    target = model.target_encoder.blocks[0].mlp.w_in
    holds = {"encoder": target, "target_encoder": target, "context_encoder": model.encoder.blocks[0].mlp.w_in}
    for name, weight in holds.items():
        timm = load_file(written / f"{name}_timm.safetensors")
        assert torch.equal(timm["blocks.0.mlp.fc1.weight"], weight)
        assert timm["pos_embed"].shape == (1, 16, 32)


def test_config_json_says_what_every_file_holds(run, tmp_path):
    """Part, layout, dtype, pooling, and the one encoder that evaluation uses, for each file that exists."""
    written = export_run(run, tmp_path / "weights")
    model, config, *_ = load_model(run)
    described = json.loads((written / "config.json").read_text())
    files = described["files"]
    assert files.keys() == {p.name for p in written.iterdir()} - {"config.json", "README.md"}
    assert {name: (entry["part"], entry["layout"]) for name, entry in files.items()} == {
        "encoder.safetensors": ("context", "iwm-fast"),
        "target_encoder.safetensors": ("target", "iwm-fast"),
        "predictor.safetensors": ("predictor", "iwm-fast"),
        "context_encoder_timm.safetensors": ("context", "timm"),
        "target_encoder_timm.safetensors": ("target", "timm"),
        "encoder_timm.safetensors": ("target", "timm"),
    }
    assert described["evaluated_encoder"] == default_encoder(config.model) == "target"
    assert all(entry["evaluated"] == (entry["part"] == "target") for entry in files.values())
    assert files["encoder_timm.safetensors"]["same_as"] == "target_encoder_timm.safetensors"
    for name, entry in files.items():
        dtypes = {str(tensor.dtype) for tensor in load_file(written / name).values()}
        assert dtypes == {f"torch.{entry['dtype']}"} == {"torch.float32"}
        assert entry["holds"].startswith(entry["part"])
        assert entry["pooling"].startswith("mean" if entry["layout"] == "timm" else "none")
    assert model.target_encoder is not None


def test_a_shared_target_exports_the_one_encoder_that_there_is(tmp_path):
    config = tiny_config(target="shared")
    model, space = tiny_model(config)
    iwm_format.write_iwm(Trained(tmp_path, "step_000001", "0", model, config, space, 1), tmp_path)
    files = json.loads((tmp_path / "config.json").read_text())["files"]
    assert {name: entry["part"] for name, entry in files.items()} == {
        "encoder.safetensors": "context",
        "predictor.safetensors": "predictor",
        "context_encoder_timm.safetensors": "context",
        "encoder_timm.safetensors": "context",
    }
    assert files["encoder_timm.safetensors"]["evaluated"]
    timm = load_file(tmp_path / "encoder_timm.safetensors")
    assert torch.equal(timm["blocks.1.mlp.fc1.weight"], model.encoder.blocks[1].mlp.w_in)
    assert space.dim == model.action_dim


@pytest.fixture
def umask():
    """Set the process's umask during a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def modes(folder):
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_written_for_users_has_the_umask_s_mode(run, tmp_path, umask, mask):
    """Weights, DeepSpeed's layout, a finetuned reader, results and the list of bad files have open()'s mode."""
    umask(mask)
    export_run(run, tmp_path / "weights")
    export_universal(run, tmp_path / "universal")
    write_result(str(tmp_path / "result.json"), "evaluate", {})
    BadSamples(2, 0.5, tmp_path).add("a.jpg", "torn", 0, 0)
    shapes = {"0": HeadShape(3, dense=False)}
    model, _ = tiny_model(tiny_config())
    reader = reader_builder(model, "linear", "pretrained", shapes, "context")()
    about = {"mode": "linear", "shapes": shapes, "classes": {"0": "abc"}, "results": {}, "environment": {}}
    save_finetuned(tmp_path / "finetuned", reader, model=model.config, **about)
    found = modes(tmp_path)
    assert len(found) > 15
    assert set(found.values()) == {0o666 & ~mask}, found
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_dir()} == {0o777 & ~mask}


def test_a_run_s_files_have_the_umask_s_mode(run):
    now = os.umask(0o022)
    os.umask(now)
    found = modes(run)
    assert {"config.yaml", "metrics.jsonl", "latest"} <= found.keys()
    assert set(found.values()) == {0o666 & ~now}, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_of_any_dtype_and_layout_are_written_as_the_library_reads_them(tmp_path, dtype):
    whole = torch.arange(15).reshape(3, 5).to(dtype)
    tensors = {"turned": whole.T, "scalar": whole[1, 2], "empty": whole[:0], "every other": whole[:, ::2]}
    about = write_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    found = load_file(tmp_path / "t.safetensors")
    assert about["bytes"] == (tmp_path / "t.safetensors").stat().st_size
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (dtype, t.shape) for n, t in tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_existing_folder_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_run(run, tmp_path / "there")
    with pytest.raises(UserError, match="not a run"):
        export_run(tmp_path / "there", tmp_path / "out")


def test_a_checkpoint_that_is_not_there_is_named(run):
    with pytest.raises(UserError, match="step_000099"):
        load_model(run, "step_000099")


@pytest.mark.slow
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
                # fp32 in another order of sums, as engine/onnx_export says, relative to the largest value
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


TIMM = (
    TORCHVISION
    + """
import json
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

folder = Path(sys.argv[1])
arguments = json.loads((folder / "config.json").read_text())["timm"]
cfg = arguments.pop("pretrained_cfg")
network = VisionTransformer(**arguments, norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=cfg["norm_eps"]))
images = load_file(sys.argv[2])["images"].permute(0, 3, 1, 2).float() / 255
mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
found = {}
for path in folder.glob("*_timm.safetensors"):
    network.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        found[path.name] = network.eval().forward_features((images - mean) / std)
        found[path.name + " pooled"] = network((images - mean) / std)
save_file({name: value.contiguous() for name, value in found.items()}, sys.argv[3])
"""
)


def test_timm_s_vision_transformer_gives_the_same_features(run, tmp_path):
    """The real timm, in a process of its own, so that neither it nor torchvision enters this one."""
    require_libraries("timm")
    written = export_run(run, tmp_path / "weights")
    model, *_ = load_model(run)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images.safetensors")
    (tmp_path / "theirs.py").write_text(TIMM)
    words = [tmp_path / "theirs.py", written, tmp_path / "images.safetensors", tmp_path / "features.safetensors"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "features.safetensors")
    files = {"encoder": "target", "target_encoder": "target", "context_encoder": "context"}
    assert len(found) == 2 * len(files)
    for name, which in files.items():
        with torch.no_grad():
            want = model.encode(images, which)
        # Two orders of fp32 sums through two blocks, for features of size 1.
        torch.testing.assert_close(found[f"{name}_timm.safetensors"], want, rtol=0, atol=1e-5)
        pooled = want.mean(dim=1)  # as evaluation pools, and config.json says
        torch.testing.assert_close(found[f"{name}_timm.safetensors pooled"], pooled, rtol=0, atol=1e-5)
    assert (model.encode(images, "target") - model.encode(images, "context")).abs().max() > 1e-3


def guide(first_line):
    """The block of Python of docs/guides/export.md that begins so."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"(?ms)^```python\n(.*?)^```", text) if first_line in block)


def test_the_guide_s_encoder_in_plain_pytorch_gives_the_same_tokens(run, tiny_images, tmp_path, monkeypatch):
    export_run(run, tmp_path / "weights" / "a")
    shutil.copy(tiny_images / "warm" / "000.jpg", tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(guide("def encode(images)"), names)
    model, *_ = load_model(run)
    pixels = read_files([tmp_path / "cat.jpg"], 32)
    mean, std = (torch.tensor(names["cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    seen = (names["read"]("cat.jpg") * std + mean) * 255
    torch.testing.assert_close(seen, pixels.permute(0, 3, 1, 2).float(), rtol=0, atol=2.01)  # rounded twice in both
    with torch.no_grad():
        tokens = names["encode"]((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(tokens, model.encode(pixels, "target"), rtol=0, atol=1e-5)
    assert names["features"].shape == (1, 32)


@pytest.mark.slow
def test_the_guide_s_timm_and_onnx_give_the_same_tokens(run, tmp_path):
    export_run(run, tmp_path / "weights" / "a", onnx=True)
    model, *_ = load_model(run)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    action = torch.full((2, model.action_dim), 0.2)
    save_file({"pixels": pixels, "action": action}, tmp_path / "in.safetensors")
    program = [
        TORCHVISION,
        guide("pretrained_cfg=None"),
        'given = load_file("in.safetensors")',
        "pixels, action = given['pixels'].numpy(), given['action'].numpy()",
        guide("import onnxruntime"),
        'mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))',
        "with torch.no_grad():",
        '    timm_s = network.forward_features((given["pixels"].permute(0, 3, 1, 2) / 255 - mean) / std)',
        "from safetensors.torch import save_file",
        'found = {"timm": timm_s.contiguous(), "onnx": torch.from_numpy(tokens), "told": torch.from_numpy(predicted)}',
        'save_file(found, "out.safetensors")',
    ]
    (tmp_path / "program.py").write_text("\n".join(program))
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, check=True, timeout=300)
    found = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        target, told = model.encode(pixels, "target"), model.predict(model.encode(pixels, "context"), action)
    for name, want in {"timm": target, "onnx": target, "told": told}.items():
        torch.testing.assert_close(found[name], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("write", [export_run, export_universal])
def test_a_disk_that_fills_up_is_one_line_that_names_the_folder_and_leaves_nothing(write, run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(iwm_format, "_write_weights", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/out: cannot be written: No space left on device; choose another"
    ):
        write(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
