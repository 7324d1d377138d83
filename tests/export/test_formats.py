"""Every format, opened by its own library as its model card says, gives what the run's networks compute."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from reference_libraries import HERE, require_libraries, run_program
from safetensors.torch import load_file
from small_run import small_config

import iwm_fast
from iwm_fast.cli.main import main
from iwm_fast.engine import pretrain
from iwm_fast.engine.checkpoint.load import load_export
from iwm_fast.errors import UserError
from iwm_fast.eval.measurements import weights_of
from iwm_fast.export import transformers_format
from iwm_fast.export.described import open_trained
from iwm_fast.export.weights import export_run, export_trained
from iwm_fast.models.iwm import IWM

SIDE = 32
# Name: keys of the model, the class of transformers that fits the encoder which evaluation reads.
ARCHITECTURES = {
    "plain": ({}, "IJepaModel"),
    "learned": ({"positions": "learned", "norm_eps": 1e-5}, "IJepaModel"),
    "class-token": ({"prefix_tokens": 1}, "Dinov2Model"),
    "class-token-odd-mlp": (
        {"encoder": {"depth": 2, "width": 32, "heads": 2, "mlp_ratio": 2.3}, "prefix_tokens": 1, "norm_eps": 1e-12},
        "ViTModel",
    ),
    "registers": ({"prefix_tokens": 4, "positions": "learned"}, "Dinov2WithRegistersModel"),
    "rope": ({"positions": "rope", "prefix_tokens": 1, "norm_eps": 1e-5}, "DINOv3ViTModel"),
    "rope-registers": ({"positions": "rope", "prefix_tokens": 5, "rope_base": 50.0}, "DINOv3ViTModel"),
    "rope-alone": ({"positions": "rope", "norm_eps": 1e-5}, None),
    "mlp-predictor": ({"predictor": {"kind": "mlp", "conditioning": "block"}}, "IJepaModel"),
    "action-tokens": ({"predictor": {"conditioning": "sequence+block"}}, "IJepaModel"),
    "shared": ({"target": "shared", "prefix_tokens": 1}, "Dinov2Model"),
    "frozen": (
        {
            "target": "frozen",
            "target_init": "/somewhere/teacher",
            "target_encoder": {
                "encoder": {"depth": 1, "width": 48, "heads": 3}, "prefix_tokens": 2, "positions": "learned"
            },
        },
        "IJepaModel",
    ),
}  # fmt: skip
# In the quick suite, where test_weights opens an export with timm; each of the others loads for seconds.
TRACED = ("plain", "registers", "rope-registers", "frozen")
QUICK = {("plain", "transformers"), ("registers", "transformers")}
CASES = [
    pytest.param(name, form, marks=() if (name, form) in QUICK else pytest.mark.slow)
    for name in ARCHITECTURES
    for form in ("timm", "transformers", *(["pt2"] if name in TRACED else []))
    if (name, form) != ("rope-alone", "transformers")
]


@torch.no_grad()
def randomised(model: IWM) -> IWM:
    """Move every parameter off its initial value, so that nothing hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def run(tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("formats") / "run"
    pretrain(small_config(tiny_images, train__steps=2, eval__bank=8), out)
    return out


def trained(run, name):
    """The run with the architecture of that name, all parameters random."""
    found = open_trained(run)
    keys = dict(ARCHITECTURES[name][0])
    base = found.config.model.model_dump()
    keys["predictor"] = base["predictor"] | keys.get("predictor", {})
    model = type(found.config.model).model_validate(base | keys)
    config = found.config.model_copy(update={"model": model})
    torch.manual_seed(1)
    return dataclasses.replace(found, config=config, model=randomised(IWM(model, found.space.dim)))


def guide(part):
    """The block of Python of docs/guides/export.md that has these words."""
    text = (HERE.parent / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"(?ms)^```python\n(.*?)^```", text) if part in block)


def guide_folder(root):
    """A folder in which the guide's programs run: its exports are those of the architecture "plain"."""
    folder = root / "guide"
    (folder / "weights").mkdir(parents=True)
    for name, form in {"hub": "transformers", "t": "timm", "p": "pt2"}.items():
        (folder / "weights" / name).symlink_to(root / "plain" / form)
    shutil.copy(root / "plain" / "pt2" / "cat.jpg", folder)
    program = [
        guide("AutoImageProcessor"),
        "wanted, told, pixels = features, predicted, pixels['pixel_values']",
        guide("local-dir:"),
        "assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()",
        "import numpy",
        'images = torch.from_numpy(numpy.array(Image.open("cat.jpg")))[None]',
        guide("torch.export.load"),
        "assert (predicted - told).abs().max() <= 1e-5 * told.abs().max()",
    ]
    (folder / "README.md").write_text("```python\n" + "\n".join(program) + "\n```\n")
    return folder


@pytest.fixture(scope="module")
def opened(request, run, tmp_path_factory):
    """The exports that the chosen tests need, opened in one process: {architecture: (trained, folder)}, pixels."""
    require_libraries("timm", "transformers")
    root = tmp_path_factory.mktemp("opened")
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wide = torch.randint(0, 256, (61, 61, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    here = [one for one in request.session.items if one.module is request.module]
    wanted = {"plain": ["transformers"]}
    for case in [one.callspec.params for one in here if hasattr(one, "callspec")]:
        if "form" in case:
            wanted.setdefault(case["name"], []).append(case["form"])
    with_guide = any(one.name.startswith("test_the_guide") for one in here)
    if with_guide:
        wanted["plain"] = ["timm", "transformers", "pt2"]
    found, folders = {}, []
    for name, forms in wanted.items():
        found[name] = trained(run, name)
        for form in dict.fromkeys(forms):
            folder = export_trained(found[name], root / name / form, [form])
            Image.fromarray(pixels.numpy()).save(folder / "cat.jpg", format="png")  # without loss
            Image.fromarray(wide.numpy()).save(folder / "large.jpg", format="png")
            folders.append(folder)
    if with_guide:
        folders.append(guide_folder(root))
    run_program(HERE / "reference_exports.py", *folders)
    return {name: (one, root / name) for name, one in found.items()}, pixels[None]


def close(found, want):
    assert found.shape == want.shape
    assert float((found - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_card_s_code_gives_the_run_s_tokens_and_predictions(opened, name, form):
    every, pixels = opened
    one, folder = every[name]
    found = load_file(folder / form / "opened.safetensors")
    with torch.no_grad():
        tokens = one.model.encode(pixels, one.evaluated)
        predicted = one.model.predict(one.model.encode(pixels, "context"), torch.zeros(1, one.space.dim))
        if one.evaluated == "target":
            assert float((tokens - one.model.encode(pixels, "context")).abs().max()) > 0.1
    close(found["tokens"], tokens)
    close(found["features"], tokens.mean(1))
    if form != "timm":
        close(found["predicted"], predicted)
    said = json.loads((folder / form / "opened.json").read_text())
    assert said["said"] == []
    if form == "transformers":
        assert said["encoder"] == ARCHITECTURES[name][1]
        assert said["loading"] == {".": {}, "predictor": {}}


def test_the_processor_reads_images_as_evaluation_does(opened):
    from iwm_fast.eval.world_model.given_images import read_files
    from iwm_fast.models.vit import IMAGENET_MEAN, IMAGENET_STD

    folder = opened[0]["plain"][1] / "transformers"
    found = load_file(folder / "opened.safetensors")["pixels"]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    ours = read_files([folder / "large.jpg"], SIDE).permute(0, 3, 1, 2).float()
    assert float(((found * std + mean) * 255 - ours).abs().max()) <= 2.01


@pytest.mark.slow
def test_the_guide_s_programs_give_the_run_s_features_and_predictions(opened):
    """The child process has compared the libraries with each other; here with the run."""
    every, pixels = opened
    one, folder = every["plain"]
    found = load_file(folder.parent / "guide" / "opened.safetensors")
    action = torch.zeros(1, one.space.dim)
    action[0, one.space.names.index("brightness")] = 0.3
    with torch.no_grad():
        close(found["features"], one.model.encode(pixels, "target").mean(1))
        close(found["predicted"], one.model.predict(one.model.encode(pixels, "context"), action))


def test_a_card_has_configuration_data_results_with_controls_and_no_path(run, tiny_images, tmp_path):
    assert (
        main(
            [
                "evaluate",
                str(run),
                "--data",
                str(tiny_images),
                "--what",
                "mrr,knn",
                "--images",
                "2",
                "--json",
                str(tmp_path / "a.json"),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "a.json").read_text())
    text = (export_run(run, tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| MRR |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{found['mrr']:.3f}"
    assert cells[3:5] == [f"{found['mrr_chance']:.3f}", f"{found['mrr_shuffled']:.3f}"]
    (row,) = (line for line in text.splitlines() if line.startswith("| k-NN"))
    assert row.rstrip("| ").endswith(f"{100 * found['knn_untrained']:.1f} %")
    assert f"On `{tiny_images.name}`, step 2:" in text
    assert "24 images, 16 seen in training." in text
    assert "vision transformer, 2 blocks, width 32, 2 heads, MLP of 128, no prefix tokens, fixed sin-cos" in text
    assert str(tiny_images.parent) not in text
    assert str(run.parent) not in text
    assert text.startswith("---\nlibrary_name: iwm-fast\n")
    documents = "".join(path.read_text() for path in (tmp_path / "a").glob("*.json"))
    assert str(tiny_images.parent) not in documents


def test_without_results_a_card_says_how_to_measure_and_takes_an_evaluation_json(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results", "report"))
    text = (export_run(other, tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    assert "None recorded for this checkpoint. `iwm-fast evaluate RUN --data DIR` measures" in text
    document = {"step": 2, "mrr": 0.4321, "mrr_chance": 0.1, "mrr_shuffled": 0.2, "splits": {"test": "/x/photos/test"}}
    own = weights_of(other / "checkpoints" / "step_000002")
    for weights, shown in ((own, True), ("of another training", False)):
        (other / "evaluation.json").write_text(json.dumps(document | {"weights": weights}))
        text = (export_run(other, tmp_path / f"shown {shown}") / "README.md").read_text(encoding="utf-8")
        assert ("| MRR | 0.432 |" in text) == shown
        assert ("On `test`, step 2:" in text) == shown


LACKING = {
    "rope-alone": "none of its classes has rope without a class token",
    "registers-odd-mlp": "none of its classes has registers and an MLP of 2.3 times the width, no whole number",
}


@pytest.mark.parametrize("name", LACKING)
def test_what_transformers_has_no_class_for_is_one_line(run, tmp_path, monkeypatch, name):
    odd = {"encoder": {"depth": 2, "width": 32, "heads": 2, "mlp_ratio": 2.3}, "prefix_tokens": 2}
    monkeypatch.setitem(ARCHITECTURES, "registers-odd-mlp", (odd, None))
    line = f"--format transformers: {LACKING[name]}; give one or more of iwm, timm, pt2, onnx"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        export_trained(trained(run, name), tmp_path / "a", ["transformers"])
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_a_format_lacks_is_one_line_that_names_those_that_fit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_format, "hub_class", lambda _: "none of its classes has it")
    with pytest.raises(
        UserError,
        match=r"^--format transformers: none of its classes has it; give one or more of iwm, timm, pt2, onnx$",
    ):
        export_run(run, tmp_path / "a", formats=["iwm", "transformers"])
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_fails_midway_leaves_no_folder(run, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers_format, "_write_predictor", fails)
    with pytest.raises(UserError, match=r"a: cannot be written: No space left on device; choose another --out"):
        export_run(run, tmp_path / "a", formats=["timm", "transformers"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "words"), [("--format onnx", {"formats": ["timm", "onnx"]}), ("--onnx", {"onnx": True})]
)
def test_without_its_packages_onnx_is_one_line_before_anything_is_read(tmp_path, monkeypatch, option, words):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=f"^{option} needs onnxscript, which is not installed: pip install"):
        export_run(tmp_path / "no run", tmp_path / "a", **words)


def test_an_export_of_a_frozen_target_names_each_encoder_s_arguments_and_no_path(run, tmp_path):
    one = trained(run, "frozen")
    folder = export_trained(one, tmp_path / "a", ["iwm"])
    described = json.loads((folder / "config.json").read_text())
    assert described["evaluated_encoder"] == "context"
    assert described["timm"] == described["timm_by_part"]["context"]
    told = described["timm_by_part"]["target"]
    assert (told["embed_dim"], told["class_token"], told["reg_tokens"]) == (48, True, 1)
    assert described["model"]["target_init"] == "teacher"
    assert described["files"]["target_encoder.safetensors"]["holds"].startswith("target encoder: frozen,")
    model, *_ = load_export(folder)
    pixels = torch.randint(0, 256, (1, SIDE, SIDE, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encode(pixels, "target"), one.model.encode(pixels, "target"))
        assert torch.equal(model.encode(pixels), one.model.encode(pixels))


def test_initial_weights_are_in_config_json_and_card_without_paths(run, tmp_path):
    """As a run records them: the family, sums, and what was folded, resized and left out."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    file = {"bytes": 3, "sha256": "0123456789abcdef" * 4}
    about = {
        "path": "/home/me/dinov2", "files": {"model.safetensors": file}, "family": "DINOv2",
        "folded": ["LayerScale"], "resized": [], "left_out": [f"head.{i}" for i in range(9)],
    }  # fmt: skip
    (other / "initial_weights.json").write_text(json.dumps({"schema": "x", "init": about}))
    folder = export_run(other, tmp_path / "a")
    described = json.loads((folder / "config.json").read_text())["initial_weights"]
    assert described == {"schema": "x", "init": about | {"path": "dinov2"}}
    text = (folder / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if "initial weights |" in line)
    assert row == (
        "| encoder's initial weights | DINOv2; `dinov2`; `model.safetensors` sha256 0123456789abcdef…; "
        "folded: LayerScale; left out: head.0, head.1, head.2, head.3 and 5 more |"
    )
    assert "and what the training images and the initial weights allow" in " ".join(text.split())
    (other / "initial_weights.json").write_text("{")
    with pytest.raises(UserError, match=r"initial_weights.json: cannot be read \(not JSON\); restore it"):
        export_run(other, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_of_several_formats_the_root_names_the_folder_that_iwm_fast_reads(run, tmp_path, capsys):
    folder = export_run(run, tmp_path / "all", formats=["iwm", "transformers", "iwm"])
    assert sorted(path.name for path in folder.iterdir()) == ["iwm", "transformers"]
    assert iwm_fast.load(folder / "iwm").step == 2
    for place, line in {
        folder: f"{folder}: an export in several formats, each in its folder; name {folder / 'iwm'}",
        folder / "transformers": "an export in the format transformers; export the run with --format iwm",
    }.items():
        with pytest.raises(UserError, match=re.escape(line)):
            iwm_fast.load(place)


def test_the_command_prints_every_file(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "--format", "timm", "--format", "transformers"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == sorted(str(path) for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert str(tmp_path / "a" / "transformers" / "predictor" / "modeling_iwm_predictor.py") in printed


@pytest.mark.slow
def test_the_format_onnx_is_read_as_its_card_says_and_documents_names_and_opset(run, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra onnx)")
    one = trained(run, "registers")
    folder = export_trained(one, tmp_path / "a", ["onnx"])
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "cat.jpg", format="png")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.findall(r"(?ms)^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"))[0], names)
    with torch.no_grad():
        close(torch.from_numpy(names["tokens"]), one.model.encode(pixels[None], "target"))
        seen = one.model.encode(pixels[None])
        close(torch.from_numpy(names["predicted"]), one.model.predict(seen, torch.zeros(1, one.space.dim)))
    about = json.loads((folder / "config.json").read_text())
    assert about["schema"] == "iwm-fast-graphs/1"
    for part, signature in about["onnx"]["signatures"].items():
        graph = onnx.load(folder / about["onnx"][part])
        assert [one.version for one in graph.opset_import if not one.domain] == [about["onnx"]["opset"]] == [20]
        assert [one.name for one in graph.graph.input] == list(signature["inputs"])
        assert [one.name for one in graph.graph.output] == list(signature["outputs"])


def test_the_card_of_this_project_s_format_encodes_and_predicts(run, tmp_path, monkeypatch):
    one = trained(run, "registers")
    folder = export_trained(one, tmp_path / "a", ["iwm"])
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "cat.jpg", format="png")
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.findall(r"(?ms)^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"))[0], names)
    action = torch.from_numpy(one.space.vector({"brightness": 0.3}))[None]
    with torch.no_grad():
        close(names["features"], one.model.encode(pixels[None], "target").mean(1))
        close(names["predicted"], one.model.predict(one.model.encode(pixels[None]), action))
