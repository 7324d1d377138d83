"""The table: family × (loads, features equal, trains 20 steps, exports, opens again, equal).

`test_features` has the first two for every size; here each family's weights start a run, which is exported and opened
by timm and by transformers without our code. To see it: ``pytest -m slow -s tests/families/test_table.py``.
"""

import json
import math

import pytest
import torch
from PIL import Image
from reference_features import FAMILIES, HEADS, TOLERANCE, require_equal, weights_of
from reference_libraries import HERE, run_program
from safetensors.torch import load_file
from small_run import losses, small_config, state

from iwm_fast.engine import load_model, pretrain
from iwm_fast.export.weights import export_run
from iwm_fast.families import fit_encoder, read_weights, recognise

pytestmark = pytest.mark.slow  # sixteen trainings, and a process that opens their exports

COLUMNS = ("loads", "features equal", "trains 20 steps", "exports", "opens again", "equal")
FORMATS = ("timm", "transformers")


def keys(folder):
    """The keys of a configuration with the architecture of a reference's file."""
    found = recognise(read_weights(weights_of(folder)))
    own, shape = found.architecture, found.architecture.shape
    if not found.heads_known:
        shape = shape.model_copy(update={"heads": HEADS})
    return {
        "model__init": str(weights_of(folder)), "model__encoder": shape.model_dump(), "model__patch": own.patch,
        "model__prefix_tokens": own.prefix_tokens, "model__positions": own.positions, "model__norm_eps": own.norm_eps,
    }  # fmt: skip


@pytest.fixture(scope="module")
def table(references, tiny_images, tmp_path_factory):
    """The rows by family, and the pixels of the one image that all exports see."""
    root = tmp_path_factory.mktemp("table")
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = {name: dict.fromkeys(COLUMNS, False) for name in FAMILIES}
    folders = []
    for name, row in rows.items():
        row["loads"] = recognise(read_weights(weights_of(references / name))).family == FAMILIES[name]
        row["features equal"] = bool(require_equal(references / name))
        config = small_config(tiny_images, train__steps=20, train__lr=1e-3, **keys(references / name))
        pretrain(config, root / name)
        found = losses(root / name)
        row["trains 20 steps"] = len(found) == 20 and all(map(math.isfinite, found))
        export_run(root / name, root / f"{name}_exports", formats=FORMATS)
        row["exports"] = True
        for form in FORMATS:
            folder = root / f"{name}_exports" / form
            Image.fromarray(pixels.numpy()).save(folder / "cat.jpg", format="png")  # without loss
            Image.fromarray(pixels.numpy()).save(folder / "large.jpg", format="png")
            folders.append(folder)
    run_program(HERE / "reference_exports.py", *folders)
    for name, row in rows.items():
        model, *_ = load_model(root / name)
        with torch.no_grad():
            want = model.encode(pixels[None], "target")
        opened = [load_file(root / f"{name}_exports" / form / "opened.safetensors")["tokens"] for form in FORMATS]
        row["opens again"] = all(one.shape == want.shape for one in opened)
        row["equal"] = all(bool((one - want).abs().max() <= TOLERANCE * want.abs().max()) for one in opened)
    return rows, root, pixels


def test_every_family_loads_trains_exports_and_opens_again_with_equal_features(table):
    rows = table[0]
    print("\n" + " | ".join(("family", *COLUMNS)))
    for name, row in rows.items():
        print(" | ".join((f"{FAMILIES[name]} ({name})", *("yes" if row[column] else "NO" for column in COLUMNS))))
    assert [(name, column) for name, row in rows.items() for column in COLUMNS if not row[column]] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_training_moved_the_weights_and_recorded_where_they_came_from(table, references, name):
    _, root, _ = table
    record = json.loads((root / name / "initial_weights.json").read_text())["init"]
    assert record["family"] == FAMILIES[name]
    begun = keys(references / name)
    found = recognise(read_weights(weights_of(references / name)))
    model, config, *_ = load_model(root / name)
    first = fit_encoder("w", found, config.model.architecture).encoder
    moved = [not torch.equal(first[key], value) for key, value in model.encoder.state_dict().items()]
    assert all(moved), begun
    saved = state(root / name, 20)
    assert saved.keys() >= {f"weight/encoder.{key}" for key in first}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_starts_another_run_with_its_exact_encoder(table, name, form):
    """There and back: our export in the library's format, read by its family's module."""
    _, root, _ = table
    model, config, *_ = load_model(root / name)
    found = recognise(read_weights(root / f"{name}_exports" / form))
    state = fit_encoder("w", found, config.model.architecture).encoder
    for key, value in model.target_encoder.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
