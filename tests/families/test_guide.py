"""The worked example of docs/guides/start_from_weights.md, as it stands there but for the download and the length."""

import json
import re
import shlex

import pytest
from reference_libraries import HERE, TORCHVISION, require_libraries, run_program

GUIDE = HERE.parent / "docs" / "guides" / "start_from_weights.md"
# A small model in the same folder and files, and two short steps.
SMALL = "pretrained=True, img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2"
SHORT = [
    "model.encoder={depth: 2, width: 32, heads: 2}", "model.image=112", "model.predictor.depth=1",
    "model.predictor.width=32", "train.steps=2", "train.global_batch=4", "train.micro_batch=null", "train.warmup=1",
    "train.precision=fp32", "zero.stage=0", "data.device=cpu", "data.threads=1", "masks.min_context=1",
    "log.tensorboard=false",
]  # fmt: skip


def blocks(kind):
    """The fenced blocks of a language, "" for what a command prints."""
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"))
    return [text for language, text in found if language == kind]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder in which the example's program ran."""
    require_libraries("timm")
    folder = tmp_path_factory.mktemp("guide")
    program = blocks("python")[0].replace("pretrained=True", SMALL.replace("True", "False"))
    (folder / "program.py").write_text(TORCHVISION + program)
    run_program(folder / "program.py", cwd=folder)
    return folder


@pytest.mark.slow
def test_the_example_runs_and_says_what_the_guide_shows(saved, tiny_images, command, monkeypatch):
    monkeypatch.chdir(saved)
    lines = [shlex.split(re.sub(r"\\\n\s*", " ", block))[1:] for block in blocks("sh")[:2]]
    refused, accepted = ([word.replace("photos/train", str(tiny_images)) for word in line] for line in lines)
    shown = [" ".join(block.split()) for block in blocks("")]
    found = command(*refused[:-2], *SHORT, *refused[-2:])
    assert found.returncode == 2
    assert " ".join(found.stderr.split()) == shown[0]
    found = command(*accepted[:-2], *SHORT, *accepted[-2:])
    assert found.returncode == 0, found.stderr
    said = " ".join(next(line for line in found.stderr.splitlines() if line.startswith("model.init")).split())
    assert said == shown[1].replace("37×37 to 16×16", "4×4 to 8×8")
    record = json.loads((saved / "runs" / "dinov2" / "initial_weights.json").read_text())
    assert record["init"]["resized"] == ["positions interpolated from 4×4 to 8×8 (antialiased bicubic)"]


@pytest.mark.slow
def test_configuration_and_plan_take_the_keys_without_the_weights(command, tmp_path):
    words = ["model.init=weights/gone", "model.prefix_tokens=1", "model.positions=learned", "model.patch=14"]
    for name in ("config", "plan"):
        found = command(name, "vit_small_p16_224.yaml", "data.root=photos/train", *words)
        assert found.returncode == 0, found.stderr
    found = command("pretrain", "vit_small_p16_224.yaml", "data.root=photos/train", *words, "--out", tmp_path / "run")
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("iwm-fast: model.init: weights/gone: no such file or folder")
