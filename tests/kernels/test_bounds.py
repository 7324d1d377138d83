"""Parsing of machine code, and the bounds computed from it, against small cases done by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.kernels._aot.bounds import matrix_bound
from iwm_fast.kernels._aot.sass import Code
from iwm_fast.kernels._mlp.operands import describable
from iwm_fast.kernels._mlp.workspace import chunk_rows, mlp_workspace, use_workspace, workspace_bytes
from iwm_fast.kernels._tuning.candidates import Choice, possible, slices_of


def sass(*lines):
    """Return lines as nvdisasm prints them: an instruction, or a label."""
    return "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/  {line} ;" for i, line in enumerate(lines))


PLAIN = sass(
    "S2R R0, SR_TID.X",
    "MOV R1, R2",
    ".L_x_1:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24",
    "@!P0 BAR.ARV 0x1, 0x80",
    "IADD3 R3, R3, 0x1, RZ",
    "@P1 BRA `(.L_x_1)",
    "FADD R4, R4, R5",
    "STG.E [R6.64], R4",
    "EXIT",
    "NOP",
)


def test_a_loop_and_what_is_around_it():
    code = Code.parse(PLAIN)
    loop = code.loop()
    assert code.total == 11  # without labels and NOP
    assert (loop.instructions, loop.matrix, loop.barriers) == (6, 2, 2)
    assert loop.outside == 11 - 6
    assert not loop.persistent
    assert code.matrix_shapes == {"64x128x16": 2}


def test_a_program_that_walks_over_tiles_has_a_loop_in_a_loop():
    """The epilogue, 7 instructions of the outer loop, is outside; 2 that run once belong to no tile."""
    code = Code.parse(
        sass(
            "S2R R0, SR_TID.X",
            ".L_x_1:",
            "MOV R1, R2",
            ".L_x_2:",
            "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
            "IADD3 R3, R3, 0x1, RZ",
            "@P1 BRA `(.L_x_2)",
            *["FADD R4, R4, R5"] * 4,
            "STG.E [R6.64], R4",
            "@P0 BRA `(.L_x_1)",
            "EXIT",
        )
    )
    loop = code.loop()
    assert (loop.instructions, loop.matrix, loop.barriers, loop.outside) == (3, 1, 0, 7)
    assert loop.persistent


def test_a_turn_is_the_shortest_way_round():
    """A spinning wait, or a rare branch, is not part of an iteration."""
    code = Code.parse(
        sass(
            ".L_x_1:",
            "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
            "@P0 BRA `(.L_x_3)",
            *["NANOSLEEP 0x20"] * 5,
            ".L_x_3:",
            "@P1 BRA `(.L_x_1)",
            "EXIT",
        )
    )
    assert code.loop().instructions == 3


def test_code_without_a_loop_has_none_and_one_without_matrices_is_found_on_request():
    assert Code.parse(sass("MOV R1, R2", "EXIT")).loop() is None
    code = Code.parse(sass("MOV R1, R2", ".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)", "EXIT"))
    assert code.loop() is None
    assert code.loop(matrix=False).instructions == 2


def about(**changes):
    given = {
        "arch": "sm_90", "programs": 1, "persistent": False, "loop_instructions": 100, "outside_instructions": 1000,
        "config": {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "TMA": False},
    }  # fmt: skip
    config = given["config"] | changes.pop("config", {})
    return given | changes | {"config": config}


def test_bounds_of_a_forward_multiply_by_hand():
    """128 × 128 of a depth of 384: 3,072 tensor core cycles, six iterations of 200 issue slots, 2,000 outside."""
    found = matrix_bound("hidden", "block 384", about())
    assert (found["tensor_cycles"], found["loop_cycles"], found["outside_cycles"]) == (3072, 1200, 2000)
    assert found["serial"] == pytest.approx(3072 / (3072 + 2000))
    assert found["overlapped"] is None
    assert found["l2_bytes_per_token"] == 2 * 384 * (12 + 12)  # x once for each of 12 columns, w for each 128 rows
    assert found["last_wave"] == pytest.approx(784 * 12 / (72 * 132))
    # 1,179,648 operations per token at 4,096 per cycle and SM, 132 SMs, 1.755 GHz; 18,432 bytes at 7 TB/s.
    assert found["by_l2"][1] == pytest.approx(1179648 / (4096 * 132 * 1.755e9) / (18432 / 7e12))


@pytest.mark.parametrize("change", [{"programs": 2}, {"persistent": True}], ids=str)
def test_an_epilogue_is_hidden_only_where_something_runs_beside_it(change):
    found = matrix_bound("hidden", "block 384", about(**change))
    assert found["overlapped"] == pytest.approx(3072 / 3200)


def test_both_multiplies_of_the_hidden_layer_count():
    """By pointers they are two loops, so twice the iterations; by descriptors one loop does both per iteration."""
    apart = matrix_bound("hidden_backward", "block 384", about())
    together = matrix_bound("hidden_backward", "block 384", about(config={"TMA": True}))
    assert apart["tensor_cycles"] == together["tensor_cycles"] == 2 * 3072
    assert (apart["loop_cycles"], together["loop_cycles"]) == (2400, 1200)


def test_a_weight_gradient_s_slices_by_hand():
    """36 blocks of 1536 × 384: three slices make 108 programs of 264 at a time; seven make 252, the first > 90 %."""
    found = matrix_bound("weight_grad", "block 384", about(programs=2))
    assert slices_of(36, 10**6, 132) == 7
    assert found["last_wave"] == pytest.approx(252 / 264)
    assert found["partial_bytes_per_token"] == pytest.approx(2 * 4 * 7 * 1536 * 384 / 100352)


@given(blocks=st.integers(1, 400), most=st.integers(0, 2000), processors=st.integers(1, 200))
def test_slices_are_the_fewest_that_fill_the_last_wave(blocks, most, processors):
    def filled(slices):
        waves = (blocks * slices + processors - 1) // processors
        return blocks * slices / (waves * processors)

    found = slices_of(blocks, most, processors)
    assert 1 <= found <= max(1, min(most, 32))
    assert all(filled(fewer) < 0.9 for fewer in range(1, found)) or filled(found) < 0.9
    if filled(found) < 0.9:
        assert filled(found) == max(filled(s) for s in range(1, max(1, min(most, 32)) + 1))


def test_descriptors_point_at_matrices_whose_rows_start_at_sixteen_bytes():
    x = torch.zeros(8, 32, dtype=torch.bfloat16)
    assert describable(x, None, x[:, 8:], x[1:])
    assert not describable(x, x[:, 1:])  # starts two bytes later
    assert not describable(torch.zeros(8, 30, dtype=torch.bfloat16))  # rows of 60 bytes
    assert not describable(x.t())
    assert not describable(x[:, ::2])
    assert not describable(x[:1].expand(8, 32))  # row stride 0


def test_a_choice_by_pointers_is_always_possible():
    for arch, element, kind in (("sm_100", 2, "tma action"), ("sm_80", 4, "any row"), ("interpreter", 4, "any")):
        assert possible(Choice("triton", 64, 64, 32), arch, element, kind)
    assert possible(Choice("tma", 64, 64, 32), "interpreter", 2, "tma action")


def test_a_workspace_is_not_chunked_below_its_limit_and_held_to_it_above():
    assert chunk_rows(100_352, 1536, 2, 2, 2**30) == 100_352
    assert chunk_rows(100_352, 1536, 2, 1, 2**20) == 256  # 786,432 bytes
    assert chunk_rows(341, 1536, 2, 1, 2**20) == 341
    assert chunk_rows(1000, 1536, 2, 1, 1) == 64


def test_a_call_s_own_limit_comes_before_that_of_the_process():
    sizes, chunked = (1000, 384, 1536, 2), 256 * 2 * (1536 + 384)
    assert workspace_bytes() == 2**30
    with use_workspace(2**20):
        assert mlp_workspace(*sizes, backward=False) == chunked
        assert mlp_workspace(*sizes, backward=False, workspace=2**30) == 1000 * 2 * (1536 + 384)
    assert workspace_bytes() == 2**30
    assert mlp_workspace(*sizes, backward=False, workspace=2**20) == chunked
    with pytest.raises(ValueError, match="workspace is 0 bytes"), use_workspace(0):
        pass
