"""A run's choices of block sizes: equal on all ranks, equal when a step is repeated, and made between steps only."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from iwm_fast.kernels._aot.launches import recording
from iwm_fast.kernels._choices.made_calls import made_call
from iwm_fast.kernels._choices.run_choices import Adopted, RunChoices, read_adopted
from iwm_fast.kernels._mlp import passes
from iwm_fast.kernels._tuning import tuner as _tuning
from iwm_fast.kernels._tuning.candidates import LIBRARY, Choice, candidates_of
from iwm_fast.kernels._tuning.tuner import Tuner, key_of, use_tuner

SIZES, ABOUT = (5000, 1536, 384), "tma row"
KEY = "hidden bfloat16 8192x1536x384 tma row"
ORDER = candidates_of("sm_90", "hidden")
META = torch.device("meta")


def made(folder, fastest=1, table=None, architecture="sm_90"):
    """Return a run's choices on a device where candidate number `fastest` is the fastest, and what was timed."""
    timed = []

    def clock(call):
        timed.append(call)
        place = (len(timed) - 1) % len(ORDER)
        return abs(place - fastest % len(ORDER)) + 1.0

    return RunChoices(Tuner("A_GPU", architecture, 10**9, folder, clock), META, table or {}), timed


def ask(choices, sizes=SIZES, call=lambda choice: choice):
    return choices.run("hidden", torch.bfloat16, sizes, call, ABOUT)


def meet(ranks, step):
    """Do what the engine does between steps, where all ranks meet."""
    found = ranks[0].answer([choices.take_noted() for choices in ranks], step)
    for choices in ranks:
        choices.adopt(found)
        choices.begin(step)


@pytest.fixture
def ranks(tmp_path):
    """Two ranks on different machines, which would choose differently, in their first step."""
    found = [made(tmp_path / str(rank), fastest=1 + rank)[0] for rank in range(2)]
    for choices in found:
        choices.begin(1)
    return found


def test_within_a_step_the_first_candidate_is_used_and_nothing_is_timed(tmp_path):
    choices, timed = made(tmp_path)
    choices.begin(1)
    assert [ask(choices), ask(choices)] == [ORDER[0]] * 2
    assert not timed
    assert choices.lacking
    assert [noted.rows for noted in choices.take_noted().values()] == [SIZES[0]]
    assert not choices.lacking


def test_ranks_that_would_choose_differently_use_the_first_one_s_choices(ranks):
    assert [ask(choices) for choices in ranks] == [ORDER[0]] * 2
    meet(ranks, 2)
    assert [ask(choices) for choices in ranks] == [ORDER[1]] * 2
    assert ranks[0].table == ranks[1].table == {KEY: Adopted(ORDER[1], 2)}


def test_what_the_first_rank_never_meets_is_timed_by_it_all_the_same(ranks):
    """Ranks have different numbers of tokens, so their rows may fall into different buckets."""
    ask(ranks[0], (4000, 1536, 384))
    ask(ranks[1])
    meet(ranks, 2)
    assert sorted(ranks[0].table) == ["hidden bfloat16 4096x1536x384 tma row", KEY]
    assert ask(ranks[1]) == ORDER[1]
    assert not any(choices.lacking for choices in ranks)


def test_a_number_of_rows_that_no_step_had_takes_the_choice_of_the_nearest_and_is_never_timed(tmp_path):
    table = {
        "hidden bfloat16 4096x1536x384 tma row": Adopted(ORDER[2], 9),  # of a later step
        "hidden bfloat16 2048x1536x384 tma row": Adopted(ORDER[1], 1),
        "hidden bfloat16 65536x1536x384 tma row": Adopted(LIBRARY, 1),
    }
    choices, _ = made(tmp_path, table=table)
    choices.begin(2)
    assert ask(choices) == ORDER[1]
    assert not choices.lacking
    choices.begin(9)
    assert ask(choices) == ORDER[2]


def test_a_repeated_step_uses_the_same_choices(ranks, tmp_path):
    """The table of a run that was killed later: its first two steps lacked a choice, its third has it."""
    for choices in ranks:
        choices.begin(2)
        ask(choices)
    meet(ranks, 3)
    again, timed = made(tmp_path / "later", fastest=2, table=ranks[0].table)
    used = []
    for step in (1, 2, 3, 4):
        again.begin(step)
        used.append(ask(again))
    assert used == [ORDER[0], ORDER[0], ORDER[1], ORDER[1]]
    assert not again.lacking
    assert not timed


def test_the_run_s_choice_comes_before_what_ships_and_what_the_machine_knows(tmp_path, monkeypatch):
    shipped, machine, run = ORDER[1], ORDER[2], LIBRARY
    monkeypatch.setattr(_tuning, "_shipped", lambda _: {KEY: {"choice": vars(shipped)}})
    tmp_path.joinpath(f"A_GPU-triton-{triton.__version__}.json").write_text(
        json.dumps({KEY: {"choice": vars(machine)}})
    )
    assert ask(made(tmp_path, table={KEY: Adopted(run)})[0]) == run
    without, _ = made(tmp_path)
    without.begin(1)
    assert ask(without) == shipped
    meet([without], 2)
    assert without.table == {KEY: Adopted(shipped, 2)}
    monkeypatch.setattr(_tuning, "_shipped", lambda _: {})
    known, timed = made(tmp_path)
    ask(known)
    meet([known], 2)
    assert known.table == {KEY: Adopted(machine, 2)}
    assert not timed


@pytest.mark.parametrize(
    "foreign", [Choice("triton", 512, 512, 512, 8, 3), Choice("tma", 1, 1, 1), Choice("other")], ids=lambda c: c.by
)
def test_a_choice_that_this_device_cannot_make_is_said_once_and_replaced(foreign, tmp_path):
    choices, _ = made(tmp_path, table={KEY: Adopted(foreign)})
    choices.begin(7)
    with pytest.warns(RuntimeWarning, match=f"{KEY}: A_GPU cannot run this run's") as warned:
        assert [ask(choices), ask(choices)] == [ORDER[0]] * 2
    assert len(warned) == 1
    meet([choices], 8)
    assert choices.table == {KEY: Adopted(ORDER[1], 8)}


def test_a_choice_that_fails_on_one_rank_is_left_by_all(ranks):
    def call(choice):
        if choice == ORDER[1]:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return choice

    for choices in ranks:
        ask(choices)
    meet(ranks, 2)
    with pytest.warns(RuntimeWarning, match="excluded"):
        assert ask(ranks[1], call=call) == ORDER[0]
    assert ask(ranks[0]) == ORDER[1]
    with pytest.warns(RuntimeWarning, match="excluded"):
        meet(ranks, 3)
    assert ask(ranks[0]) == ask(ranks[1]) != ORDER[1]
    assert ranks[0].table == ranks[1].table


def test_without_memory_to_time_with_the_first_candidate_stays(ranks, monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("iwm_fast.kernels._choices.run_choices.made_call", none)
    ask(ranks[0])
    with pytest.warns(RuntimeWarning, match="no memory is left"):
        meet(ranks, 2)
    assert ranks[1].table == {KEY: Adopted(ORDER[0], 2)}


def test_on_the_interpreter_nothing_is_noted(tmp_path):
    choices, timed = made(tmp_path, architecture="interpreter")
    choices.begin(1)
    ask(choices)
    assert not choices.timed
    assert not choices.lacking
    assert not timed


def test_entries_are_read_back_and_those_of_another_kind_are_none():
    adopted = Adopted(ORDER[0], 3)
    assert read_adopted(json.loads(json.dumps(adopted.document()))) == adopted
    assert read_adopted({"choice": {"by": "library"}, "seconds": {}}) == Adopted(LIBRARY)  # as in tuned.json
    good = adopted.document()
    for damaged in (
        None, [], "x", {}, {"choice": 3}, {"choice": {}}, {"choice": {"by": 3}}, {"choice": {"by": "x", "more": 1}},
        {"choice": {"by": "triton", "block_n": "64"}}, {"choice": {"by": "triton", "block_n": True}},
        good | {"from_step": "2"}, good | {"from_step": -1}, good | {"from_step": None},
    ):  # fmt: skip
        assert read_adopted(damaged) is None, damaged


class Keys:
    """Replaces the tuner: records every matmul's key and rows, each run by the library or by the first candidate."""

    def __init__(self):
        self.found = {}

    def run(self, product, dtype, sizes, call, about):
        self.found.setdefault(key_of(product, dtype, sizes, about), sizes[0])
        return call(candidates_of("sm_90", product)[1])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("actions", [0, 10, 20], ids=["no action", "action", "per image"])
@pytest.mark.parametrize(("width", "dtype"), [(384, torch.bfloat16), (100, torch.bfloat16), (36, torch.float32)])
def test_every_matmul_of_the_mlp_can_be_called_from_its_key(width, dtype, actions, norm):
    def some(*shape):
        return torch.empty(*shape, dtype=dtype, device=META)

    rows, hidden, keys = 700, 2 * width, Keys()
    x, grad = some(rows, width), some(rows, width)
    weights = [some(hidden, width), some(hidden), some(width, hidden), some(width)]
    conditioned = [some(4, actions), some(hidden, actions), torch.empty(5, dtype=torch.int32, device=META)]
    affine = [some(width), some(width)] if norm else [None, None]
    given = [*weights, *(conditioned if actions else [None] * 3), *affine]
    with recording(lambda *_: None), use_tuner(keys):
        for residual in (True, False):
            passes.forward(x, *given, residual, 1e-6, "gelu", 2**30)
            passes.backward(grad, x, *given, residual, 1e-6, "gelu", 2**30, True)
    assert {key.product for key in keys.found} == {"hidden", "project", "plain", "hidden_backward", "weight_grad"}
    for key, count in keys.found.items():
        assert made_call(key, count, META) is not None, key


@pytest.mark.parametrize(
    ("product", "about"),
    [
        ("project", "tma row residual"),
        ("project", "any plain residual"),
        ("plain", "tma plain"),
        ("weight_grad", "any"),
    ],
)
def test_a_made_up_call_computes_on_numbers_that_are_not_zero(product, about):
    """With operands that descriptors cannot address if the key says so; these need no kernel of ours."""
    call = made_call(key_of(product, torch.float32, (50, 24, 16), about), 50, torch.device("cpu"))
    assert call is not None
    assert 1.0 < call(LIBRARY).std() < 10.0


def test_making_operands_up_leaves_the_training_s_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made_call(key_of("plain", torch.float32, (50, 24, 16), "tma plain"), 50, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_key_that_no_operands_give_is_not_made_up():
    """Rows of 17 bf16 elements do not start at multiples of 16 bytes."""
    assert made_call(key_of("weight_grad", torch.bfloat16, (50, 25, 17), "tma"), 50, META) is None
