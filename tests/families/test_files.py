"""Files and folders of weights: what is read from each, and one line for what cannot be."""

import json
import pickle

import pytest
import torch
from made_weights import OWN, hub_folder, timm_state
from safetensors.torch import save_file

from iwm_fast.errors import UserError
from iwm_fast.families import HALF, IMAGENET, fit_encoder, read_weights, recognise


def same(path, state):
    """Whether a file or folder gives the encoder of a state, through whatever wrapper and prefix."""
    found = recognise(read_weights(path))
    assert torch.equal(found.encoder["blocks.1.mlp.w_in"], state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(found.encoder["pos_embed"], state["pos_embed"][0, 1:])
    return found


WRAPPED = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict of ranks": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best": 0.5},
    "teacher of two": lambda state: {
        "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
        "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.mlp.weight": torch.ones(2, 2)},
    },
    "an average beside the weights": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_is_found_in_its_wrapper(tmp_path, wrapper, legacy):
    state = timm_state()
    torch.save(WRAPPED[wrapper](state), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=not legacy)
    found = same(tmp_path / "w.pth.tar", state)
    if wrapper == "teacher of two":
        assert "teacher.backbone of the file's 2 networks" in found.notes
        assert "teacher.head.mlp.weight" in found.left_out


def test_a_safetensors_file_and_a_folder_of_shards_are_read(tmp_path):
    state = timm_state()
    save_file(state, tmp_path / "any_name.safetensors")
    same(tmp_path / "any_name.safetensors", state)
    shards = tmp_path / "shards"
    shards.mkdir()
    names = list(state)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, shards / f"model-{i}.safetensors")
    index = {name: f"model-{i}.safetensors" for i, part in enumerate((names[::2], names[1::2])) for name in part}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (shards / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224"}))
    same(shards, state)
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"index\.json: names model-1\.safetensors, which is not there; download it beside the others$"
    ):
        read_weights(shards)


def test_pixels_are_those_that_the_folder_s_files_say(tmp_path):
    folder = hub_folder(tmp_path / "hub")
    assert recognise(read_weights(folder)).pixels is None
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert recognise(read_weights(folder)).pixels == HALF
    # The file of a folder is the folder.
    assert recognise(read_weights(folder / "model.safetensors")).pixels == HALF
    timm = {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"mean": IMAGENET.mean, "std": IMAGENET.std}}
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps(timm))
    save_file(timm_state(), tmp_path / "timm" / "model.safetensors")
    assert recognise(read_weights(tmp_path / "timm")).pixels == IMAGENET


def test_pixels_fold_into_the_patch_projection_exactly():
    """The projection of the same image, normalised in the two ways."""
    state = timm_state()
    weight, bias = state["patch_embed.proj.weight"].double(), state["patch_embed.proj.bias"].double()
    image = torch.rand(3, 8, 8, dtype=torch.float64)
    want = torch.einsum("dcyx,cyx->d", weight, (image - 0.5) / 0.5) + bias
    source = recognise_state(state)
    fitted = fit_encoder("w", source, OWN, "half").encoder
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    ours = {name: fitted[f"patch_embed.proj.{name}"].double() for name in ("weight", "bias")}
    found = torch.einsum("dcyx,cyx->d", ours["weight"], (image - mean) / std) + ours["bias"]
    assert (found - want).abs().max() < 1e-5 * want.abs().max()


def recognise_state(state):
    from iwm_fast.families import Contents, LazyTensors

    return recognise(Contents("w", LazyTensors({name: lambda name=name: state[name] for name in state}), ()))


class Code:
    """Unpickling this calls a function."""

    def __reduce__(self):
        return (print, ("run",))


def truncated(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[:-200])


def numbers(path):
    path.write_bytes(b"0123456789" * 9)


def code(path):
    torch.save({"model": timm_state(), "args": Code()}, path)


def code_alone(path):
    path.write_bytes(pickle.dumps(Code()))


WHOLE = r"w: cannot be read whole \(.*\); download"
# fmt: off
BAD = {
    "a path that is not there": (lambda _: None, r"w: no such file or folder; name weights"),
    "a truncated safetensors file": (
        lambda path: truncated(path, lambda p: save_file(timm_state(), p)), WHOLE,
    ),
    "a truncated state_dict": (
        lambda path: truncated(path, lambda p: torch.save(timm_state(), p)), WHOLE,
    ),
    "a truncated legacy state_dict": (
        lambda path: truncated(
            path, lambda p: torch.save(timm_state(), p, _use_new_zipfile_serialization=False)
        ),
        WHOLE,
    ),
    "neither format": (numbers, r"w: is neither a safetensors file nor one of torch\.save"),
    "code": (code, r"w: holds more than tensors, and reading that could run its code; if you trust it, keep"),
    "code alone": (code_alone, r"w: (holds more than tensors|cannot be read whole)"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), r"w: holds a list, no state_dict; save a model's"),
    "a folder without config.json": (
        lambda path: (path.mkdir(), save_file(timm_state(), path / "model.safetensors")),
        r"w: has model\.safetensors without config\.json; name a run, an export, a folder with both",
    ),
    "an empty folder": (lambda path: path.mkdir(), r"w: has neither config\.json nor weights"),
    "a folder without weights": (
        lambda path: (path.mkdir(), (path / "config.json").write_text("{}")),
        r"w: has config\.json, and no model\.safe",
    ),
    "a config.json that is none": (
        lambda path: (hub_folder(path), (path / "config.json").write_text("{")), r"config\.json: is no JSON \(",
    ),
    "pixels that are none": (
        lambda path: (
            hub_folder(path), (path / "preprocessor_config.json").write_text('{"image_mean": [1], "image_std": [0]}')
        ),
        r"w: its files say that pixels have mean \[1\] and std \[0\], which are not three numbers",
    ),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), r"w: has no tensors, no family known here; known are"),
    "a convolutional network": (
        lambda path: save_file({"conv1.weight": torch.ones(2, 3, 3, 3), "fc.bias": torch.ones(2)}, path),
        r"w: has conv1\.weight, fc\.bias, no family known here; known are runs and exports of iwm-fast; timm's",
    ),
    "a file of our own export": (
        lambda path: save_file(timm_state() | {"blocks.0.mlp.norm_weight": torch.ones(32)}, path),
        r"w: is an encoder of iwm-fast alone; name the folder of its run or export$",
    ),
    "two networks alike": (
        lambda path: torch.save({"a": timm_state(), "b": timm_state()}, path),
        r"w: holds 2 networks \(a, b\); save the one to start from alone",
    ),
}
# fmt: on


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path, fault, capsys):
    make, line = BAD[fault]
    make(tmp_path / "w")
    with pytest.raises(UserError, match=line) as caught:
        recognise(read_weights(tmp_path / "w"))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""  # nothing was run


def without(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


REFUSED = {
    "SwiGLU": (lambda s: s | {"blocks.0.mlp.w12.weight": torch.ones(4)}, r"blocks\.0\.mlp\.w12\.weight: an MLP"),
    "qk-norm": (lambda s: s | {"blocks.1.attn.q_norm.weight": torch.ones(16)}, r"normalised queries and keys"),
    "CLIP": (lambda s: s | {"norm_pre.weight": torch.ones(32)}, r"norm_pre\.weight: a norm"),
    "something else": (lambda s: s | {"blocks.0.attn.sink": torch.ones(2)}, r"blocks\.0\.attn\.sink: no part"),
    "a norm after pooling": (without("norm.weight", "norm.bias"), r"norm\.weight is missing: this encoder ends with"),
    "a missing block": (
        lambda _: {k: v for k, v in timm_state(depth=3).items() if not k.startswith("blocks.1")},
        r"block 1 of 3 is missing",
    ),
    "a missing part": (without("blocks.1.attn.proj.weight"), r"block 1 has no proj\.weight"),
    "one colour": (
        lambda s: s | {"patch_embed.proj.weight": torch.ones(32, 1, 8, 8)},
        r"patch_embed\.proj\.weight is 32×1×8×8; patches",
    ),
    "positions of no square": (
        lambda s: s | {"pos_embed": torch.ones(1, 13, 32)},
        r"pos_embed has 12 positions of patches, no square grid, so they cannot be interpolated",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_encoder_cannot_compute_is_named(fault):
    change, line = REFUSED[fault]
    with pytest.raises(UserError, match=line) as caught:
        recognise_state(change(timm_state()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"hidden_act": "gelu_new"}, r"hidden_act is gelu_new; this encoder's is the exact gelu"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, r"use_swiglu_ffn: an MLP with a gate"),
        ({"model_type": "beit"}, r"model_type is 'beit'; those known are ijepa, vit"),
        ({"num_attention_heads": None}, r"num_attention_heads is None, no number of heads"),
    ],
)
def test_a_folder_of_transformers_that_computes_something_else_is_refused(tmp_path, config, line):
    with pytest.raises(UserError, match=line):
        recognise(read_weights(hub_folder(tmp_path / "w", **config)))


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_quickgelu_224", "vit_so400m_patch16_siglip_384"])
def test_architectures_of_timm_with_another_activation_are_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    save_file(timm_state(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} has the activation"):
        recognise(read_weights(tmp_path))
