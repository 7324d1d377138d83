"""The tuner: its choices, its memory, and failures that it survives."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from iwm_fast.kernels._tuning import tuner as _tuning
from iwm_fast.kernels._tuning.candidates import ARCHITECTURES, LIBRARY, PRODUCTS, SHARED_LIMIT, Choice, candidates_of
from iwm_fast.kernels._tuning.tuner import Key, Tuner, bucket, nearest, tuner, use_tuner

SIZES = (5000, 1536, 384)


def make(folder, seconds=None, shared=10**9, name="A_GPU", architecture="sm_90"):
    """Return a tuner with a fake clock for each choice: by default later candidates take longer."""
    order = candidates_of(architecture, "hidden")
    wanted = seconds or {choice: 1.0 + order.index(choice) for choice in order}
    timed = []

    def clock(call):
        choice = call()
        timed.append(choice)
        return wanted[choice]

    return Tuner(name, architecture, shared, folder, clock), timed


def ask(tuner, sizes=SIZES, dtype=torch.bfloat16, call=lambda choice: choice, about="tma row"):
    return tuner.run("hidden", dtype, sizes, call, about)


@pytest.mark.parametrize(("rows", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (8192, 8192), (8193, 16384)])
def test_bucket(rows, expected):
    assert bucket(rows) == expected


def test_the_fastest_is_taken_and_timed_once_a_bucket(tmp_path):
    order = candidates_of("sm_90", "hidden")
    seconds = dict.fromkeys(order, 2.0) | {order[2]: 1.0}
    tuner, timed = make(tmp_path, seconds)
    assert ask(tuner) == order[2]
    assert len(timed) == len(order)
    assert ask(tuner, (4097, 1536, 384)) == order[2]  # the same bucket
    assert len(timed) == len(order)
    ask(tuner, (4000, 1536, 384))
    assert len(timed) == 2 * len(order)


def test_another_process_on_the_machine_reads_the_answer(tmp_path):
    first, _ = make(tmp_path)
    chosen = ask(first)
    second, timed = make(tmp_path)
    assert ask(second) == chosen
    assert not timed
    other, timed = make(tmp_path, name="ANOTHER_GPU")
    ask(other)
    assert timed


def _tune_slowly(folder, answers):
    tuner, timed = make(folder)
    clock = tuner.time
    tuner.time = lambda call: (time.sleep(0.05), clock(call))[1]
    ask(tuner)
    answers.put(len(timed))


def test_of_many_processes_one_tunes_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=_tune_slowly, args=(tmp_path, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = sorted(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert found == [0, 0, len(candidates_of("sm_90", "hidden"))]


def test_what_shipped_with_the_package_comes_first(tmp_path, monkeypatch):
    choice = candidates_of("sm_90", "hidden")[1]
    key = "hidden bfloat16 8192x1536x384 tma row"
    table = {key: {"choice": vars(choice)}}
    monkeypatch.setattr(_tuning, "_shipped", lambda name: table if name == "A_GPU" else {})
    tuner, timed = make(tmp_path)
    assert ask(tuner) == choice
    assert not timed


def test_candidates_without_room_are_never_tried(tmp_path):
    tuner, timed = make(tmp_path, shared=100_000)
    ask(tuner)
    assert timed
    assert all(choice.shared_bytes(2) <= 100_000 for choice in timed)
    assert len(timed) < len(candidates_of("sm_90", "hidden"))


FAILURES = [
    triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
    triton.runtime.errors.PTXASError("ptxas fatal: Ptx assembly aborted"),
]


@pytest.mark.parametrize("error", FAILURES, ids=["out of resources", "assembler"])
@pytest.mark.parametrize("when", ["while timed", "when used"])
def test_a_candidate_that_fails_is_named_once_and_the_next_is_taken(when, error, tmp_path):
    first, second = candidates_of("sm_90", "hidden")[:2]
    tuner, _ = make(tmp_path)
    if when == "when used":
        ask(tuner)

    def call(choice):
        if choice == first:
            raise error
        return choice

    with pytest.warns(RuntimeWarning, match="excluded") as warned:
        assert ask(tuner, call=call) == second
    assert ask(tuner, call=call) == second
    assert len(warned) == 1
    assert "block_n=256" in str(warned[0].message)


def test_other_errors_are_not_swallowed(tmp_path):
    def call(_):
        raise torch.OutOfMemoryError("no memory left")

    with pytest.raises(torch.OutOfMemoryError):
        ask(make(tmp_path)[0], call=call)


@pytest.mark.filterwarnings("ignore:.*excluded")
def test_when_nothing_works_the_error_says_what_to_do(tmp_path):
    def call(_):
        raise FAILURES[0]

    with pytest.raises(RuntimeError, match="set backend=reference"):
        ask(make(tmp_path)[0], call=call)


IN_A_FILE = '{"hidden bfloat16 8192x1536x384 tma row": {"choice": {"by": "library"}}}'


@pytest.mark.parametrize("content", ["", "{", "[]", IN_A_FILE])
def test_a_torn_or_foreign_file_is_found_out_again_or_used(content, tmp_path):
    tuner, _ = make(tmp_path)
    (tmp_path / f"A_GPU-triton-{triton.__version__}.json").write_text(content)
    expected = LIBRARY if "library" in content else candidates_of("sm_90", "hidden")[0]
    assert ask(tuner) == expected


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_without_locks_keeps_answers_all_the_same(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_tuning.fcntl, "flock", flock)
    first, _ = make(tmp_path)
    chosen = ask(first)
    second, timed = make(tmp_path)
    assert ask(second) == chosen
    assert not timed


def test_a_full_disk_is_said_and_each_process_finds_out_by_itself(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_tuning.Path, "write_text", full)
    tuner, timed = make(tmp_path)
    with pytest.warns(RuntimeWarning, match="not stored: No space left on device"):
        ask(tuner)
    assert timed
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_any_temporary_folder_a_place_is_named_all_the_same(monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.delenv(_tuning.TUNING_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(_tuning.tempfile, "gettempdir", none)
    assert _tuning.tuning_folder() == Path(f"/tmp/iwm-fast-{os.getuid()}")


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("in the way")
    tuner, timed = make(tmp_path / "file")
    assert ask(tuner) == candidates_of("sm_90", "hidden")[0]
    assert timed


@pytest.mark.parametrize(
    ("about", "dtype", "architecture", "pointed"),
    [
        ("tma row", torch.bfloat16, "sm_90", True),
        ("tma action", torch.float16, "sm_90", True),
        ("tma image residual", torch.bfloat16, "sm_100", True),
        ("any row", torch.bfloat16, "sm_90", False),  # rows that do not start at a multiple of 16 bytes
        ("tma row", torch.float32, "sm_90", False),
        ("tma action", torch.bfloat16, "sm_100", False),  # Triton does not compile it
        ("tma action", torch.bfloat16, "sm_120", False),
    ],
)
def test_descriptors_are_tried_only_where_they_can_point(about, dtype, architecture, pointed, tmp_path):
    tuner, timed = make(tmp_path, architecture=architecture)
    ask(tuner, dtype=dtype, about=about)
    assert any(choice.by == "tma" for choice in timed) == pointed
    assert any(choice.by == "triton" for choice in timed)


def test_surroundings_are_tuned_apart_and_kept_apart(tmp_path):
    tuner, timed = make(tmp_path)
    for about in ("tma row", "any row", "tma action", "tma row residual", "tma row"):
        ask(tuner, about=about)
    table = json.loads((tmp_path / f"A_GPU-triton-{triton.__version__}.json").read_text())
    size = "hidden bfloat16 8192x1536x384"
    assert sorted(table) == [f"{size} {about}" for about in ("any row", "tma action", "tma row", "tma row residual")]
    count = len(candidates_of("sm_90", "hidden"))
    assert len(timed) == 4 * count - 1  # one cannot be tried by pointers alone


def test_matmuls_looked_up_while_another_is_timed_do_not_wait_for_its_lock(tmp_path):
    tuner = Tuner("A_GPU", "sm_90", 10**9, tmp_path, lambda call: (call(), 1.0)[1])

    def outer(choice):
        ask(tuner)
        return choice

    tuner.run("project", torch.bfloat16, SIZES, outer, "any row")
    table = json.loads((tmp_path / f"A_GPU-triton-{triton.__version__}.json").read_text())
    assert sorted(key.split()[0] for key in table) == ["hidden", "project"]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "sm_86", "sm_120", "sm_70"])
def test_every_architecture_has_candidates(architecture, product):
    found = candidates_of(architecture, product)
    assert found
    assert found[-1] == LIBRARY
    limit = SHARED_LIMIT.get(architecture)
    assert limit is None or all(choice.shared_bytes(2) <= limit for choice in found)


def test_the_interpreter_times_nothing(tmp_path):
    tuner = Tuner("interpreter", "interpreter", 10**9, tmp_path, pytest.fail)
    assert isinstance(ask(tuner), Choice)


def test_a_choice_made_while_a_graph_is_captured_is_not_stored(tmp_path, monkeypatch):
    """Nothing may be timed then; the same matmul outside the graph is timed."""
    order = candidates_of("sm_90", "hidden")
    tuner, timed = make(tmp_path, dict.fromkeys(order, 2.0) | {order[2]: 1.0})
    monkeypatch.setattr(_tuning, "_capturing", lambda: True)
    assert ask(tuner) == order[0]
    assert ask(tuner) == order[0]
    assert not timed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(_tuning, "_capturing", lambda: False)
    assert ask(tuner) == order[2]
    assert len(timed) == len(order)
    monkeypatch.setattr(_tuning, "_capturing", lambda: True)
    assert ask(tuner) == order[2]


def test_a_graph_takes_what_the_disk_knows_else_what_is_known_of_the_nearest_rows(tmp_path, monkeypatch):
    order = candidates_of("sm_90", "hidden")
    other, _ = make(tmp_path, dict.fromkeys(order, 2.0) | {order[1]: 1.0})
    ask(other, (100, 1536, 384))  # on the disk, by another process
    tuner, _ = make(tmp_path, dict.fromkeys(order, 2.0) | {order[2]: 1.0})
    ask(tuner, (5000, 1536, 384))
    monkeypatch.setattr(_tuning, "_capturing", lambda: True)
    assert ask(tuner, (100, 1536, 384)) == order[1]
    assert ask(tuner, (9000, 1536, 384)) == order[2]
    assert ask(tuner, (9000, 1536, 768)) == order[0]  # another matmul


def test_a_candidate_that_fails_while_a_graph_is_captured_is_not_tried_again(tmp_path, monkeypatch):
    first, second = candidates_of("sm_90", "hidden")[:2]
    tuner, _ = make(tmp_path)
    monkeypatch.setattr(_tuning, "_capturing", lambda: True)

    def call(choice):
        if choice == first:
            raise FAILURES[0]
        return choice

    with pytest.warns(RuntimeWarning, match="excluded"):
        assert ask(tuner, call=call) == second


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([16, 4096], 4096),
        ([512, 4096], 512),
        ([256, 4096], 4096),  # equally near: the larger
        ([1 << 40], 1 << 40),
        ([1024], None),  # the key itself
        ([], None),
    ],
)
def test_the_nearest_rows_that_something_is_known_of(known, expected):
    key = Key("hidden", "bfloat16", 1024, 1536, 384)
    table = {Key("hidden", "bfloat16", rows, 1536, 384): rows for rows in known}
    assert nearest(key, table.get) == expected
    assert nearest(Key("hidden", "float16", 1024, 1536, 384), table.get) is None


def test_the_tuner_in_use_is_asked_in_every_thread(tmp_path):
    """A backward pass on a GPU runs in a thread of autograd's."""
    mine, found = make(tmp_path)[0], []
    with use_tuner(mine):
        thread = threading.Thread(target=lambda: found.append(tuner(torch.device("cpu"))))
        thread.start()
        thread.join()
    assert found == [mine]
    assert tuner(torch.device("cpu")) is not mine


def test_a_backward_pass_in_a_thread_of_its_own_asks_the_tuner_in_use(tmp_path):
    """As autograd on a GPU: the thread exists before, and shares no context with the caller."""
    mine, asked = make(tmp_path)[0], []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x * 2

        @staticmethod
        def backward(_, grad):
            asked.append(tuner(grad.device))
            return grad * 2

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread exists before the tuner is replaced
        x = torch.ones(3, requires_grad=True)
        with use_tuner(mine):
            pool.submit(Product.apply(x).sum().backward).result()
    assert asked == [mine]
    assert x.grad.tolist() == [2.0] * 3
