"""The command line: help, JSON, and that errors of the user are one line on stderr with exit code 2."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import TINY_WORDS
from typer.main import get_command

from iwm_fast.cli.arguments import check_options, config_and_overrides, prepare
from iwm_fast.cli.demo import demo_rows
from iwm_fast.cli.doctor import examine
from iwm_fast.cli.main import app, main
from iwm_fast.config import load_config
from iwm_fast.config.schema_table import rows
from iwm_fast.environment import environment
from iwm_fast.errors import UserError
from iwm_fast.results import write_result

COMMANDS = [
    ["demo"],
    ["pretrain"],
    ["evaluate"],
    ["export"],
    ["embed"],
    ["finetune"],
    ["config"],
    ["doctor"],
    ["plan"],
    ["compare"],
    ["data", "synth"],
    ["data", "preview"],
    ["data", "verify"],
    ["data", "index"],
    ["data", "shard"],
]


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "iwm_fast", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a command that the user can fix."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command, capsys):
    assert main([*command, "--help"]) == 0
    assert f"Example: iwm-fast {' '.join(command)} " in f"{' '.join(capsys.readouterr().out.split())} "


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from iwm_fast.cli.main import main; main(['pretrain', '--help'])\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'xformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("iwm-fast 0.")


WRONG = {
    "unknown command": (["pretrian"], "No such command 'pretrian'. Did you mean 'pretrain'? See iwm-fast --help."),
    "missing argument": (["export"], "Missing argument 'RUN'. See iwm-fast export --help."),
    "missing configuration": (["pretrain", "--out", "somewhere"], "CONFIG is missing: name a YAML file or a packaged"),
    "no configuration to resume with": (
        ["pretrain", "train.steps=3", "--out", "somewhere", "--resume", "auto"],
        "somewhere/config.yaml: no such file to resume with; name a CONFIG",
    ),
    "missing option": (["pretrain", "demo.yaml"], "Missing option '--out'. See iwm-fast pretrain --help."),
    "unknown key": (["config", "demo", "train.lrr=1"], "command line: train.lrr: unknown key; did you mean train.lr?"),
    "wrong range": (["config", "demo", "train.lr=-1"], "command line: train.lr: found -1; allowed: a number above 0"),
    "no such file": (["config", "no/such.yaml"], "no/such.yaml: no such file; name another, or one of "),
    "no configuration": (["config"], "config: CONFIG is missing; give a YAML file, or one of demo.yaml, "),
    "unknown measure": (
        ["evaluate", "nowhere", "--data", "x", "--what", "mrr,bleu"],
        "--what: bleu: give a list of mrr, knn, linear, attentive, equivariance",
    ),
    "no run": (["evaluate", "nowhere", "--data", "x"], "nowhere: not a run (no config.yaml)"),
    "no run to export": (["export", "nowhere", "--out", "somewhere"], "nowhere: not a run (no config.yaml)"),
    "unknown layout": (
        ["export", "nowhere", "--out", "somewhere", "--layout", "flat"],
        "--layout flat: give weights or universal",
    ),
    "unknown format": (
        ["export", "nowhere", "--out", "somewhere", "--format", "iwm,tf"],
        "--format tf: give one or more of iwm, timm, transformers, pt2, onnx",
    ),
    "no format": (
        ["export", "nowhere", "--out", "somewhere", "--format", ","],
        "--format (empty): give one or more of",
    ),
    "graphs beside another format": (
        ["export", "nowhere", "--out", "somewhere", "--format", "timm", "--format", "pt2", "--onnx"],
        "--onnx adds graphs to the format iwm, which --format leaves out; give --format timm,pt2,onnx",
    ),
    "a format of DeepSpeed's layout": (
        ["export", "nowhere", "--out", "somewhere", "--layout", "universal", "--format", "timm"],
        "--format needs --layout weights: ",
    ),
    "graphs in DeepSpeed's layout": (
        ["export", "nowhere", "--out", "somewhere", "--layout", "universal", "--onnx"],
        "--onnx needs --layout weights: ",
    ),
    "data for demo": (
        ["demo", "--out", "somewhere", "data.root=x"],
        "command line: data.root: demo generates its images",
    ),
    "no size": (["data", "shard", "x", "--out", "y", "--shard-size", "many"], "many: not a size; write it as 1000000"),
    "unknown source": (
        ["data", "index", "x", "--source", "tape"],
        "Invalid value for '--source': ",
    ),
    "not an override": (
        ["data", "preview", "x", "--out", "y", "demo", "z"],
        "command line: z: expected key.path=value",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, line = WRONG[name]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"iwm-fast: {line}")
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_gives_the_traceback(place):
    words = ["config", "demo", "train.lrr=1"]
    with pytest.raises(UserError):
        main(["--debug", *words] if place == "before" else [*words, "--debug"])


@pytest.mark.parametrize("what", ["missing", "empty", "text"])
def test_a_folder_without_images_is_refused(what, tmp_path, command):
    root = tmp_path / "images"
    if what != "missing":
        root.mkdir()
    if what == "text":
        (root / "notes.txt").write_text("no picture", encoding="utf-8")
    done = command("pretrain", "vit_tiny_p4_32.yaml", f"data.root={root}", "--out", tmp_path / "run")
    assert refused(done).startswith(f"iwm-fast: {root} ")


def test_no_folder_named_is_refused(tmp_path, command):
    line = refused(command("pretrain", "vit_tiny_p4_32.yaml", "--out", tmp_path / "run"))
    assert line.startswith("iwm-fast: data.root is not set")


def test_a_run_goes_through_all_commands(tiny_images, tmp_path, command):
    """Pretrain in a process; then resume, refuse another architecture, evaluate, export."""
    out = tmp_path / "run"
    words = [
        *TINY_WORDS,
        "log.tensorboard=true",
        f"data.root={tiny_images}",
        "train.schedule_steps=2",
        "eval.bank=4",
    ]
    first = run("pretrain", *words, "train.steps=1", "--out", out)
    assert first.returncode == 0, first.stderr
    second = command("--local_rank=0", "pretrain", *words, "--out", out, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2]
    other = command("pretrain", *words, "model.predictor.depth=2", "--out", out, "--resume", "auto")
    assert "model.predictor.depth was 1" in refused(other)

    measured = command("evaluate", out, "--data", tiny_images, "--images", "2", "--json")
    assert measured.returncode == 0, measured.stderr
    figures = json.loads(measured.stdout)
    assert figures["schema"] == "iwm-fast-evaluate/1"
    assert figures["step"] == 2
    assert {"mrr", "mrr_chance", "mrr_shuffled", "mrr_neutral", "knn", "knn_untrained", "linear"} <= set(figures)
    assert "data:image/png" in (out / "report" / "index.html").read_text(encoding="utf-8")

    exported = command("export", out, "--out", tmp_path / "weights")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "weights" / "encoder.safetensors").exists()
    assert load_config(out / "config.yaml").train.global_batch == 8


def test_data_commands(tmp_path, command):
    drawn = command(
        "data", "synth", "--out", tmp_path / "set", "--classes", "2", "--train", "6", "--test", "4", "--size", "32"
    )
    assert drawn.returncode == 0, drawn.stderr
    (tmp_path / "set" / "train" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    checked = command("data", "verify", tmp_path / "set", "--json")
    assert checked.returncode == 1, checked.stderr  # a file is bad
    verdict = json.loads(checked.stdout)
    assert verdict["schema"] == "iwm-fast-data-verify/1"
    assert (verdict["files"], verdict["decoded"], len(verdict["bad"])) == (11, 10, 1)
    assert verdict["bad"][0]["file"].endswith("torn.jpg")
    shown = command(
        "data", "preview", tmp_path / "set" / "test", "--out", tmp_path / "views", "--count", "2", "vit_tiny_p4_32.yaml"
    )
    assert shown.returncode == 0, shown.stderr
    assert len(json.loads((tmp_path / "views" / "params.json").read_text(encoding="utf-8"))) == 2


def test_config_prints_yaml_that_loads_back_and_json(tmp_path, capsys):
    assert main(["config", "vit_tiny_p4_32.yaml", "train.lr=5e-4"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "c.yaml").train.lr == 5e-4
    assert main(["config", "demo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "iwm-fast-config/1"
    assert document["config"]["model"]["encoder"] == "vit_micro"


def test_config_schema_has_a_line_per_key_and_its_meaning_below(capsys):
    assert main(["config", "--schema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("train.lr  0.001  a number above 0")
    (meaning,) = (row.description for row in rows() if row.key == "train.lr")
    assert lines[place + 1] == f"    {meaning}"
    assert main(["config", "--schema", "--json"]) == 0
    assert {"key", "type", "default", "allowed", "description"} == set(json.loads(capsys.readouterr().out)["keys"][0])


def test_doctor_names_every_part_with_a_reason():
    parts = {part.part: part for part in examine()}
    stack = {"torch", "CUDA", "Triton", "xformers", "DeepSpeed", "DALI", "NCCL", "gloo"}
    assert set(parts) == stack | {"driver", "compiler", "shared memory", "disk", "open files"}
    assert all(part.reason for part in parts.values())
    assert not any(part.broken for part in parts.values())
    assert parts["torch"].used
    assert parts["DALI"].used


def test_environment_names_no_host_and_no_path():
    import platform

    text = json.dumps(environment())
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert str(Path(__file__).parent.parent) not in text
    assert environment()["packages"]["torch"] is not None


def test_results_have_schema_and_environment_and_no_nan(tmp_path):
    target = tmp_path / "new" / "r.json"
    write_result(str(target), "demo", {"x": float("nan"), "y": [1.5, float("inf")], "z": (1, "a")})
    document = json.loads(target.read_text(encoding="utf-8"))
    assert document["schema"] == "iwm-fast-demo/1"
    assert "python" in document["environment"]
    assert (document["x"], document["y"], document["z"]) == (None, [1.5, None], [1, "a"])


def test_a_result_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_result(str(tmp_path / "file" / "r.json"), "demo", {})


PREPARED = {
    "launcher": (["--local_rank=1", "pretrain", "c"], ["pretrain", "c"], False),
    "old launcher": (["pretrain", "c", "--local-rank", "1"], ["pretrain", "c"], False),
    "debug after": (["doctor", "--debug"], ["doctor"], True),
    "json at the end": (["doctor", "--json"], ["doctor", "--json", "-"], False),
    "json before an option": (["demo", "--json", "--out", "x"], ["demo", "--json", "-", "--out", "x"], False),
    "json with a file": (["demo", "--json", "f", "--out", "x"], ["demo", "--json", "f", "--out", "x"], False),
    "json to a pipe": (["doctor", "--json", "-"], ["doctor", "--json", "-"], False),
    "json before an override": (["config", "c", "--json", "a.b=1"], ["config", "c", "--json", "-", "a.b=1"], False),
    "json before a wrong key": (["demo", "--json", "lrr=1"], ["demo", "--json", "-", "lrr=1"], False),
    "json with a sign in a folder": (["doctor", "--json", "o/a=b"], ["doctor", "--json", "o/a=b"], False),
    "json with a sign in its name": (["doctor", "--json=a=b"], ["doctor", "--json=a=b"], False),
    "home after a sign": (["export", "--out=~/a"], ["export", "--out=/home/me/a"], False),
    "home as a word": (
        ["data", "verify", "~/a", "--json", "~"],
        ["data", "verify", "/home/me/a", "--json", "/home/me"],
        False,
    ),
    "no home": (["export", "--out=a~/b", "x=~/y"], ["export", "--out=a~/b", "x=~/y"], False),
    "after two dashes": (["x", "--", "--debug"], ["x", "--", "--debug"], False),
}


@pytest.mark.parametrize("name", PREPARED)
def test_arguments_are_prepared_for_the_parser(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    before, after, debug = PREPARED[name]
    assert prepare(before) == (after, debug)


# Options and keys of other frameworks, and the end of the line that answers them.
FROM_ELSEWHERE = {
    "pretrain demo.yaml --batch-size 32": "write train.global_batch=32",
    "pretrain demo.yaml --batch_size=32 --out r": "write train.global_batch=32",
    "pretrain --lr 1e-3": "write train.lr=1e-3",
    "pretrain -lr 1e-3": "write train.lr=1e-3",
    "pretrain demo.yaml --epochs 3": "write train.epochs=3",
    "pretrain demo.yaml --seed 3": "write train.seed=3",
    "pretrain --fp16 demo.yaml": "write train.precision=... (bf16 or fp32)",
    "pretrain demo.yaml --data-path x": "write data.root=x",
    "pretrain demo.yaml --output_dir x": "use --out",
    "pretrain demo.yaml --train.lr 3": "write train.lr=3, without dashes",
    "pretrain demo.yaml --gpus 8": "torchrun --nproc_per_node N -m iwm_fast pretrain ..., deepspeed or srun",
    "finetune r --data d --batch-size 3": "use --batch",
    "finetune r --data d --learning-rate 3": "use --lr",
    "evaluate r --data d --ckpt x": "use --checkpoint",
    "plan demo --devices 3": "use --gpus-per-node",
    "bench step --num-workers 2": "use --threads",
    "pretrain demo.yaml --out r --resume": "--resume: needs a value (auto|never|PATH)",
    "pretrain demo.yaml --resume --out r": "--resume: needs a value (auto|never|PATH); --out follows it",
    "finetune r --data d --lr --steps 3": "--lr: needs a value; --steps follows it",
    "pretrain demo.yaml --out r batch_size=3": "batch_size: unknown key; did you mean train.global_batch?",
    "finetune r --data d --frobnicate 3": "No such option: --frobnicate See iwm-fast finetune --help.",
}


@pytest.mark.parametrize("line", FROM_ELSEWHERE)
def test_who_writes_the_word_of_another_framework_is_told_ours(line, capsys):
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.rstrip("\n").endswith(FROM_ELSEWHERE[line])


EMPTY = {
    "plan '' train.lr=1": "iwm-fast plan: an argument is empty",
    "evaluate '' --data d": "iwm-fast evaluate: an argument is empty",
    "data verify ''": "iwm-fast data verify: an argument is empty",
    "evaluate r --data ''": "--data: empty (an unset shell variable?); give a value (DIR)",
    "evaluate r --data=": "--data: empty (an unset shell variable?); give a value (DIR)",
    "evaluate r --data d --cache ''": (
        "--cache: empty (an unset shell variable?); give a value (DIR), or leave --cache out"
    ),
    "evaluate r --data d --json=": "--json: empty (an unset shell variable?); give a value (FILE)",
    "pretrain demo --out ''": "--out: empty (an unset shell variable?); give a value",
    "export r --out x --checkpoint ''": "--checkpoint: empty (an unset shell variable?); give a value",
}


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_word_is_not_taken_for_the_working_folder(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"iwm-fast: {EMPTY[line]}")
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_negative_values_and_values_like_options_are_left_to_the_parser():
    command = get_command(app)
    check_options(command, ["finetune", "r", "--data", "d", "--lr", "-1", "--weight-decay", "-.5"])
    check_options(command, ["data", "record", "E", "--crop", "0", "0", "1", "1", "--names", "--batch-size"])
    check_options(command, ["pretrain", "c", "--", "--batch-size"])


def test_json_before_an_override_prints_and_applies_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "demo", "--json", "train.lr=5e-4"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["train"]["lr"] == 5e-4
    assert list(tmp_path.iterdir()) == []
    assert main(["config", "demo", "--json=a=b.json"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a=b.json"]


def test_a_result_does_not_replace_a_configuration(tmp_path, monkeypatch, capsys):
    """After --json a configuration's name is read as the file."""
    monkeypatch.chdir(tmp_path)
    Path("big.yaml").write_text("train: {seed: 7}")
    assert main(["config", "--json", "big.yaml", "demo"]) == 2
    assert "big.yaml: a YAML file" in capsys.readouterr().err
    assert Path("big.yaml").read_text() == "train: {seed: 7}"


def test_an_optional_configuration_is_told_from_overrides():
    assert config_and_overrides([], "d") == ("d", [])
    assert config_and_overrides(["a.b=1"], "d") == ("d", ["a.b=1"])
    assert config_and_overrides(["c.yaml", "a.b=1"], "d") == ("c.yaml", ["a.b=1"])


def test_the_demonstrations_table_has_what_it_promises():
    names = ("mrr", "mrr_chance", "mrr_shuffled", "mrr_neutral", "knn", "knn_untrained", "linear", "linear_untrained")
    figures = {**dict.fromkeys(names, 0.5), "loss_first": 1.0, "loss_last": 0.5, "images_per_s": 9.0}
    rows = demo_rows({**figures, "steps": 3, "seconds": 4.0, "report": "r.html"})
    assert [row[0] for row in rows][:2] == ["loss", "MRR"]
    assert rows[1] == ("MRR", "0.500", "1.0 × chance (0.5000)")
