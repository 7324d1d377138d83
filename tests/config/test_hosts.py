"""Groups of ranks that hold a copy of the parameters: within a host, or refused in one line."""

import pytest

from iwm_fast.config import load_config, packaged_config
from iwm_fast.config.hosts import require_within_hosts
from iwm_fast.errors import UserError

TWO_BY_FOUR = ["a"] * 4 + ["b"] * 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_groups_within_hosts_are_accepted(size):
    require_within_hosts(size, TWO_BY_FOUR)


@pytest.mark.parametrize(
    ("size", "hosts", "said"),
    [
        (8, TWO_BY_FOUR, "ranks 0 to 7 are on several hosts (a, b); give a divisor of the ranks per host"),
        (3, TWO_BY_FOUR, "which does not divide 8 ranks evenly; give a divisor of 8"),
        (16, TWO_BY_FOUR, "and there are 8 rank(s); give at most 8, or 1 for no copy"),
        (2, ["a"] * 3 + ["b"] * 3, "ranks 2 to 3 are on several hosts (a, b)"),
        (2, ["a", "b"] * 2, "ranks 0 to 1 are on several hosts (a, b)"),
        (4, ["a", "b", "c", "d"], "ranks 0 to 3 are on several hosts (a, b, …)"),
        (2, ["a"], "and there are 1 rank(s); give at most 1"),
    ],
)
def test_others_are_refused_with_what_to_give(size, hosts, said):
    with pytest.raises(UserError) as raised:
        require_within_hosts(size, hosts)
    assert str(raised.value).startswith(f"zero.hpz_partition_size is {size}")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zero.stage=2"], "hpz_partition_size is 8, which needs stage 3, which shards parameters; stage is 2"),
        (["zero.stage=3", "zero.hpz_partition_size=0"], "zero.hpz_partition_size"),
        (["zero.stage=3", "zero.hpz_partition_size=2.5"], "zero.hpz_partition_size"),
    ],
)
def test_a_wrong_value_is_one_line(words, said):
    with pytest.raises(UserError) as raised:
        load_config(packaged_config("vit_base_p16_224_equi.yaml"), ["zero.hpz_partition_size=8", *words])
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
