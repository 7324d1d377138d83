"""Configurations: loading, a round trip through a file, and the one-line error of each mistake."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import iwm_fast
from iwm_fast.actions.transforms import CORRUPTIONS, JITTER
from iwm_fast.config import Config, dump_config, load_config, packaged_config
from iwm_fast.config.load import find_config, packaged_names
from iwm_fast.config.schema_table import rows
from iwm_fast.errors import UserError

PACKAGE = Path(iwm_fast.__file__).parent
NAMES = [
    "demo.yaml",
    "dial.yaml",
    "game.yaml",
    "mlp_predictor_shared_target.yaml",
    "vit_base_p16_224_equi.yaml",
    "vit_base_p16_224_inv.yaml",
    "vit_large_p16_224.yaml",
    "vit_small_p16_224.yaml",
    "vit_tiny_p4_32.yaml",
    "vit_tiny_p4_32_shared.yaml",
    "vit_tiny_p8_96.yaml",
]


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a configuration and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problem(path: Path, *overrides: str) -> str:
    """Return the one line that loading raises, without the folder."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{path.parent}/", "")


def test_the_packaged_configurations_are_those_of_the_readme():
    assert packaged_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configuration_loads_and_survives_a_round_trip(name, tmp_path):
    config = load_config(packaged_config(name))
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", NAMES)
def test_packaged_configuration_begins_with_what_it_is_for(name):
    head = packaged_config(name).read_text(encoding="utf-8").splitlines()[:6]
    assert head[0].startswith("# ")
    assert any("Machine:" in line for line in head)
    assert any("Values:" in line for line in head)


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_base_holds_the_stage_and_leaves_batch_and_optimizer_to_the_engine(stage):
    import json

    base = json.loads(packaged_config(f"deepspeed/zero{stage}.json").read_text(encoding="utf-8"))
    assert base["zero_optimization"]["stage"] == stage
    assert set(base) == {"zero_optimization"}


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", "./configs/demo.yaml"])
def test_packaged_configuration_is_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == packaged_config("demo")


def test_a_file_comes_before_a_packaged_configuration_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("train: {seed: 7}", encoding="utf-8")
    assert load_config(find_config("demo.yaml")).train.seed == 7


def test_numbers_are_read_as_people_write_them(file):
    """YAML 1.1, PyYAML's own, reads 1e-3 as a string and 017 as fifteen."""
    config = load_config(file("train: {lr: 1e-3, seed: 017, lr_start: .5, epochs: 1E+2}"))
    assert (config.train.lr, config.train.seed, config.train.lr_start, config.train.epochs) == (1e-3, 17, 0.5, 100.0)


def test_overrides_replace_the_file_and_later_ones_earlier_ones(file):
    path = file("train: {lr: 1e-3, ema: [0.9, 1.0]}")
    config = load_config(
        path, ["train.lr=1", "train.lr=5e-4", "train.ema=[0.5, 0.75]", "data.root=a=b", "train.steps="]
    )
    assert (config.train.lr, config.train.ema, config.data.root, config.train.steps) == (5e-4, (0.5, 0.75), "a=b", None)


AS_WRITTEN = [
    "s/set #2",
    "2012",
    "no",
    "true",
    "1e3",
    "a: b",
    "[x]",
    "{x}",
    "'quoted'",
    '"x',
    "- a",
    "!t",
    "*a",
    " x",
    "a=b",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
@pytest.mark.parametrize("key", ["data.root", "eval.root", "log.wandb", "log.prometheus_host"])
def test_a_key_that_holds_text_takes_what_stands_after_the_sign(file, key, text):
    section, name = key.split(".")
    assert getattr(getattr(load_config(file(""), [f"{key}={text}"]), section), name) == text


@pytest.mark.parametrize("key", ["data.root", "eval.root", "log.wandb"])
def test_null_is_no_text(file, key):
    section, name = key.split(".")
    path = file(f"{section}: {{{name}: x}}")
    assert getattr(getattr(load_config(path, [f"{key}=null"]), section), name) is None
    assert load_config(path, ["log.prometheus_host=null"]).log.prometheus_host == "null"


@pytest.mark.parametrize("text", ["2012", "no", "true", "1e3", "0x10", "2012-01-01", "010"])
def test_text_in_a_file_is_text_also_where_it_looks_like_something_else(file, text):
    assert load_config(file(f"data:\n  root: {text}\nlog: {{wandb: {text}}}")).data.root == text
    assert load_config(file("data:\n  root: null")).data.root is None
    assert load_config(file("data:\n  root: '2012'")).data.root == "2012"


def test_an_encoder_is_a_name_or_a_mapping_on_the_command_line_too(file):
    named = load_config(file(""), ["model.encoder=vit_tiny"])
    shaped = load_config(file(""), ["model.encoder={depth: 2, width: 8, heads: 2}", "actions.flip_probability= 1 "])
    assert (named.model.encoder_shape.width, shaped.model.encoder_shape.width) == (192, 8)


@pytest.mark.parametrize("how", ["file", "override"])
@pytest.mark.parametrize("key", ["data.root", "eval.root"])
def test_a_home_folder_is_meant_by_a_tilde(file, monkeypatch, how, key):
    monkeypatch.setenv("HOME", "/home/me")
    section, name = key.split(".")
    for text, path in {
        "~/x": "/home/me/x",
        "~": "/home/me",
        "~/a b/~": "/home/me/a b/~",
        "./~": "./~",
        "x~/": "x~/",
    }.items():
        words = [f"{key}={text}"] if how == "override" else []
        written = file("" if words else f"{section}: {{{name}: '{text}'}}")
        assert getattr(getattr(load_config(written, words), section), name) == path


def test_a_name_of_a_project_is_no_path(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(file(""), ["log.wandb=~/x"]).log.wandb == "~/x"


def test_pairs_stay_unchanged_unless_a_crop_or_a_flip_is_configured(file):
    still = load_config(file("actions: {groups: [external]}")).actions
    assert (still.crop_scale, still.flip_probability, still.jitter_probability) == ((1.0, 1.0), 0.0, 0.0)
    asked = load_config(file("actions: {groups: [external], crop_scale: [0.5, 1.0]}")).actions
    assert (asked.crop_scale, asked.flip_probability) == ((0.5, 1.0), 0.0)


def test_external_actions_survive_being_written(file, tmp_path):
    box = "{kind: continuous, names: [x, 'y: z'], low: [-1, 0.5], high: [1e-3, 2], neutral: [0, 1]}"
    config = load_config(file(f"actions: {{groups: [external], external: {box}}}"))
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.actions.external.low == (-1.0, 0.5)


def test_a_section_whose_keys_are_commented_out_has_its_defaults(file):
    assert load_config(file("train:\n  # lr: 1\nmodel:\n  predictor:\n")) == Config()
    assert load_config(file("")) == Config()


def test_an_encoder_may_be_a_shape(file):
    shape = load_config(file("model: {encoder: {depth: 2, width: 8, heads: 2}}")).model.encoder_shape
    assert (shape.depth, shape.width, shape.heads) == (2, 8, 2)


@given(
    # Not empty, which is refused; ~ has a test of its own.
    st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: t[0] != "~"),
    st.floats(1e-30, 1e30),
    st.integers(0, 2**63 - 1),
)
@example("a\x85b", 1e-3, 0)  # a line break to YAML
def test_whatever_is_written_is_read_back_equal(tmp_path_factory, root, lr, seed):
    """Text that looks like a number, a flag or YAML's own syntax stays text, and floats keep every bit."""
    config = Config.model_validate({"data": {"root": root}, "train": {"lr": lr, "seed": seed}})
    path = tmp_path_factory.mktemp("written") / "c.yaml"
    path.write_bytes(dump_config(config).encode())
    assert load_config(path) == config


def test_a_byte_order_mark_is_no_part_of_the_first_key(file):
    assert load_config(file("\ufefftrain:\r\n  seed: 7\r\n")).train.seed == 7


MISTAKES = {
    "unknown key": ("train:\n  lrr: 1e-3", "run.yaml:2: train.lrr: unknown key; did you mean train.lr?"),
    "unknown section": ("trian:\n  lr: 1e-3", "run.yaml:1: trian: unknown key; did you mean train?"),
    "key of another section": ("lr: 1", "run.yaml:1: lr: unknown key; did you mean train.lr?"),
    "unknown key of the encoder": (
        "model: {encoder: {depth: 1, width: 4, heads: 1, mlp_ration: 4}}",
        "run.yaml:1: model.encoder.mlp_ration: unknown key; did you mean model.encoder.mlp_ratio?",
    ),
    "wrong type": ("train:\n  lr: fast", 'run.yaml:2: train.lr: found "fast"; allowed: a number above 0'),
    "float for int": (
        "train: {steps: 2.5}",
        "run.yaml:1: train.steps: found 2.5; allowed: a whole number of at least 1, or null",
    ),
    "text for flag": ("log: {tensorboard: on}", 'run.yaml:1: log.tensorboard: found "on"; allowed: true or false'),
    "infinite": ("train: {lr: .inf}", 'run.yaml:1: train.lr: found ".inf"; allowed: a number above 0'),
    "out of range": (
        "data: {max_bad_fraction: 1.5}",
        "run.yaml:1: data.max_bad_fraction: found 1.5; allowed: a number from 0 to 1",
    ),
    "no choice": ("zero: {stage: 4}", "run.yaml:1: zero.stage: found 4; allowed: one of 0, 1, 2, 3"),
    "pair of three": (
        "train: {ema: [0, 0.5, 1]}",
        "run.yaml:1: train.ema: found [0, 0.5, 1]; allowed: a list of 2 numbers [first, last]",
    ),
    "jitter of pairs": (
        "actions:\n  groups: [external]\n  blur_probability: 0.2",
        "run.yaml:1: actions: blur_probability is 0.2; it must be 0 where groups is [external]",
    ),
    "external and other groups": (
        "actions: {groups: [photometric, external]}",
        (
            "run.yaml:1: actions: groups is ['photometric', 'external']; it must be [photometric], "
            "[photometric, geometric], [photometric, compression], [photometric, geometric, compression] "
            "or [external]"
        ),
    ),
    "compression alone": (
        "actions: {groups: [compression]}",
        (
            "run.yaml:1: actions: groups is ['compression']; it must be [photometric], [photometric, geometric], "
            "[photometric, compression], [photometric, geometric, compression] or [external]"
        ),
    ),
    "compression of external actions": (
        "actions:\n  groups: [external]\n  compression_probability: 0.5",
        "run.yaml:1: actions: compression_probability is 0.5; it must be 0 where groups is [external]",
    ),
    "quality beyond a JPEG's": (
        "actions: {compression_quality: [0, 95]}",
        "run.yaml:1: actions: compression_quality is [0, 95]; it must be ascending and within [1, 100]",
    ),
    "quality between two": (
        "actions: {compression_quality: [20.5, 95]}",
        "run.yaml:1: actions.compression_quality: found [20.5, 95]; allowed: a list of 2 whole numbers [first, last]",
    ),
    "qualities in the wrong order": (
        "actions: {compression_quality: [90, 20]}",
        "run.yaml:1: actions: compression_quality is [90, 20]; it must be ascending and within [1, 100]",
    ),
    "compression and geometry for a predictor of patches": (
        (
            "actions: {groups: [photometric, geometric, compression]}\n"
            "model: {predictor: {kind: mlp, conditioning: block}}"
        ),
        (
            "run.yaml: model.predictor.kind mlp sees one patch at a time and cannot move content between patches: "
            "actions.groups must be [photometric] or [photometric, compression], or use kind vit"
        ),
    ),
    "a history of images": (
        "model:\n  history: 2",
        (
            "run.yaml: model.history is 2; it must be 1 unless actions.groups is [external]: the views of one image "
            "have no earlier frames"
        ),
    ),
    "steps ahead of images": (
        "train:\n  horizon: 2",
        "run.yaml: train.horizon is 2; it must be 1 unless actions.groups is [external]: an image has no next one",
    ),
    "steps ahead of a frozen target": (
        "actions: {groups: [external]}\ntrain: {horizon: 2}\nmodel: {target: frozen, target_init: w}",
        (
            "run.yaml: train.horizon is 2; it must be 1 where model.target is frozen: predictions are in the frozen "
            "target's space, and the predictor reads the encoder's"
        ),
    ),
    "steps ahead in static shapes": (
        "actions: {groups: [external]}\ntrain: {horizon: 2, static_shapes: true}",
        (
            "run.yaml: train.horizon is 2; it must be 1 with train.static_shapes: episodes end at different steps, so "
            "that the shapes of later steps do not recur; set train.static_shapes (and train.cuda_graph) to false"
        ),
    ),
    "a history of five frames": (
        "model:\n  history: 5",
        "run.yaml:2: model.history: found 5; allowed: a whole number from 1 to 4",
    ),
    "external actions of images": (
        "actions: {external: {kind: discrete, names: [a]}}",
        "run.yaml:1: actions: external is given, so groups must be [external]; it is ['photometric']",
    ),
    "external actions without ranges": (
        "actions: {groups: [external], external: {kind: continuous, names: [a, b], low: [0]}}",
        "run.yaml:1: actions.external: low has 1 numbers; continuous actions need 2",
    ),
    "all blocks visible of images": (
        "masks: {target_blocks: 3, visible_blocks: 3}",
        (
            "run.yaml: masks.visible_blocks is 3; it must be below masks.target_blocks, unless actions.groups is "
            "[external]"
        ),
    ),
    "several sources of triplets": (
        "actions: {groups: [external]}\nviews: {sources_per_target: 2}",
        "run.yaml: views.sources_per_target must be 1 where actions.groups is [external]: a triplet has one source",
    ),
    "triplets without their actions": (
        "data: {source: triplets}",
        "run.yaml: data.source is triplets, so actions.groups must be [external]",
    ),
    "compiled at stage 3": (
        "train: {compile: true}\nzero: {stage: 3}",
        (
            "run.yaml: train.compile needs zero.stage 0, 1 or 2: stage 3 all-gathers the parameters of one module at a "
            "time, when its forward pass begins"
        ),
    ),
    "two streams at stage 3": (
        "train: {target_stream: true}\nzero: {stage: 3}",
        (
            "run.yaml: train.target_stream needs zero.stage 0, 1 or 2: stage 3 all-gathers the parameters of one "
            "module at a time, when its forward pass begins"
        ),
    ),
    "multiple without static shapes": (
        "train: {static_multiple: 64}",
        "run.yaml:1: train: static_multiple is 64, which needs static_shapes: true",
    ),
    "graphs of varying shapes": (
        "train: {cuda_graph: true}",
        "run.yaml:1: train: cuda_graph needs static_shapes: true, because a graph has fixed shapes",
    ),
    "graphs of two streams": (
        "train: {cuda_graph: true, static_shapes: true, target_stream: true}",
        ("run.yaml:1: train: cuda_graph and target_stream exclude each other: a graph is captured on one stream"),
    ),
    "graphs at stage 3": (
        "train: {cuda_graph: true, static_shapes: true}\nzero: {stage: 3}",
        (
            "run.yaml: train.cuda_graph needs zero.stage 0, 1 or 2: stage 3 all-gathers the parameters of one module "
            "at a time, when its forward pass begins"
        ),
    ),
    "graphs of images of one length": (
        "train: {cuda_graph: true, static_shapes: true}\nmodel: {attention: sdpa}",
        (
            "run.yaml: train.cuda_graph needs packed attention: model.attention sdpa launches one kernel per "
            "sequence length, so every batch launches others; use auto"
        ),
    ),
    "scalar for section": ("train: 3", "run.yaml:1: train: found 3; allowed: a section (a mapping of keys)"),
    "missing": (
        "model: {encoder: {depth: 2, width: 8}}",
        "run.yaml:1: model.encoder.heads: missing; give a whole number of at least 1",
    ),
    "empty path": ("data: {root: ''}", "run.yaml:1: data.root: empty; give a path, or null"),
    "list for text": ("data: {root: [a]}", 'run.yaml:1: data.root: found ["a"]; allowed: text, or null'),
    "dotted key": (
        "train.lr: 1e-3",
        "run.yaml:1: train.lr: dotted keys are for the command line; in a file write train: {lr: ...}",
    ),
    "dotted key below a section": (
        "model:\n  predictor.depth: 2",
        (
            "run.yaml:2: model.predictor.depth: dotted keys are for the command line; "
            "in a file write model: {predictor: {depth: ...}}"
        ),
    ),
    "too short a list": (
        "train: {betas: [0.9]}",
        "run.yaml:1: train.betas: found [0.9]; allowed: a list of 2 numbers [first, last]",
    ),
    "contradiction": ("model:\n  image: 100", "run.yaml:1: model: image 100 must be a multiple of patch 16"),
    "duplicate": ("train:\n  lr: 1\n  lr: 2", "run.yaml:3: train.lr: given twice, first on line 2; keep one"),
    "malformed": ("train:\n  lr: [1", "run.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "tab": ("train:\n\tlr: 1", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    "list": ("- 1", "run.yaml: holds [1]; a configuration is a mapping of " + ", ".join(Config.model_fields)),
    "self-reference": ("train: &a\n  lr: *a", "run.yaml:1: nested more than 16 levels deep; flatten it"),
    "object": (
        "train: !!python/object:os.system {}",
        "run.yaml:1: unknown tag tag:yaml.org,2002:python/object:os.system; remove it",
    ),
    "fp8 where the target has gradients": (
        "model:\n  target: shared\n  target_precision: fp8",
        "run.yaml:1: model: target_precision is fp8, so target must be ema or frozen: a shared encoder has gradients",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_gets_one_line_with_file_line_key_and_what_is_allowed(file, name):
    text, line = MISTAKES[name]
    assert problem(file(text)) == line


OVERRIDE_MISTAKES = {
    "data.root=": "command line: data.root: empty; give a value after =, or null",
    "log.prometheus_host=": "command line: log.prometheus_host: empty; give a value after =",
    "data.root=~nobody-of-that-name/x": (
        "command line: data.root: ~nobody-of-that-name/x: unknown home; write the whole path "
        "(./~nobody-of-that-name/x for a folder of that name)"
    ),
    "train.batch_size=3": "command line: train.batch_size: unknown key; did you mean train.global_batch?",
    "model.predictor.embed_dim=3": (
        "command line: model.predictor.embed_dim: unknown key; did you mean model.predictor.width?"
    ),
    "checkpoint.interval=3": "command line: checkpoint.interval: unknown key; did you mean checkpoint.every_steps?",
    "output_dir=x": "command line: output_dir: unknown key; use the option --out of the command line",
    "train.gpus=8": (
        "command line: train.gpus: unknown key; start ranks with a launcher: torchrun --nproc_per_node N -m "
        "iwm_fast pretrain ..., deepspeed or srun"
    ),
    "train.lr=1e-3 # faster": 'command line: train.lr: found "1e-3 # faster"; allowed: a number above 0',
    "model.mlp_workspace_mib=0": (
        "command line: model.mlp_workspace_mib: found 0; allowed: a whole number from 1 to 1048576"
    ),
    "zero.stage=!!int 1": 'command line: zero.stage: found "!!int 1"; allowed: one of 0, 1, 2, 3',
    "trian.lr=1": "command line: trian.lr: unknown key; did you mean train.lr?",
    "train.image=32": "command line: train.image: unknown key; did you mean model.image?",
    "train.lr=fast": 'command line: train.lr: found "fast"; allowed: a number above 0',
    "train.lr={1": "command line: train.lr: not valid YAML: expected ',' or '}', but got '<stream end>'",
    "train.lr": 'command line: "train.lr": not an override; write key.path=value, as train.lr=1e-3',
    "train=3": "command line: train: a section; override one key at a time, as train.seed=...",
    "model.patch=7": "run.yaml:1 and command line: model: image 32 must be a multiple of patch 7",
}


@pytest.mark.parametrize("override", OVERRIDE_MISTAKES)
def test_a_mistake_in_an_override_is_told_of_the_command_line(file, override):
    assert problem(file("model: {image: 32, patch: 4}"), override) == OVERRIDE_MISTAKES[override]


@pytest.mark.parametrize(
    ("kind", "rows", "what"),
    [
        ("vicreg", "masks.min_context=1", "tokens"),
        ("sigreg", "masks.min_context=1", "tokens"),
        ("vicreg", "model.regularizer.on=pooled", "pooled"),
    ],
)
def test_a_regulariser_of_one_row_is_refused_and_of_two_rows_not(file, kind, rows, what):
    path = file("model: {image: 32, patch: 4}")
    chosen = (f"model.regularizer.kind={kind}", rows)
    assert problem(path, *chosen, "train.global_batch=1").endswith(
        f"model.regularizer.kind {kind} is a statistic of all {what} of a step, and there may be one alone: raise "
        "train.global_batch"
    )
    load_config(path, (*chosen, "train.global_batch=2"))


def test_of_several_problems_the_first_is_told_and_the_others_counted(file):
    line = problem(file("train: {lr: a, seed: b}\nzero: {stge: 1}"))
    assert line == "run.yaml:2: zero.stge: unknown key; did you mean zero.stage? (and 2 more problems)"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert problem(tmp_path / "no.yaml") == "no.yaml: cannot be read: No such file or directory"
    assert "cannot be read" in problem(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert problem(tmp_path / "binary.yaml").startswith("binary.yaml: not UTF-8 text")


def test_an_unknown_packaged_name_lists_those_that_exist():
    with pytest.raises(UserError, match=r"^vit_tiny\.yaml: no such configuration; name a file or one of demo\.yaml, "):
        find_config("vit_tiny.yaml")


def test_every_key_says_what_it_means():
    assert [row.key for row in rows() if not row.description] == []


def test_every_key_is_read_by_something():
    """A key that nothing reads has no effect."""
    read = set()
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")):
        if path.parent.name != "config" or path.name == "batch.py":  # batch.py computes from a configuration
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    # Read through properties of the schema: model.encoder as encoder_shape, model.predictor.heads as head_count.
    through = {"model.encoder": "encoder_shape", "model.predictor.heads": "head_count"}
    # The tables name the keys of transformations, which `iwm_fast/actions/ranges.py` reads.
    read |= {*JITTER, *(f"{corruption.name}_probability" for corruption in CORRUPTIONS)}
    read |= {corruption.strength for corruption in CORRUPTIONS}
    keys = {row.key: through.get(row.key, row.key.rsplit(".", 1)[-1]) for row in rows()}
    assert [key for key, name in keys.items() if name not in read] == []


def test_a_context_that_cannot_be_large_enough_is_refused():
    """The fallback would show all that is not predicted, more than was asked for."""
    words = ["masks.context_scale=[0.1,0.15]"]
    with pytest.raises(UserError, match=r"context_scale ends at 0\.15, 9 of 64 patches, below masks\.min_context"):
        load_config(packaged_config("vit_tiny_p4_32.yaml"), words)
    load_config(packaged_config("vit_tiny_p4_32.yaml"), [*words, "masks.min_context=9"])


@pytest.mark.parametrize("words", [f"train.seed={'9' * 5000}", "train.epochs=1e308"], ids=["digits", "epochs"])
def test_a_number_without_end_is_one_line(words):
    with pytest.raises(UserError, match=r"too large a number|train\.epochs"):
        load_config(packaged_config("demo.yaml"), [words])
