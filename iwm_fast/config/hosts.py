"""Which ranks share a host, and whether groups of consecutive ranks stay within one."""

from __future__ import annotations

from collections.abc import Sequence

from iwm_fast.errors import UserError

__all__ = ["require_within_hosts"]


def require_within_hosts(size: int, hosts: Sequence[str]) -> None:
    """Raise UserError unless groups of `size` consecutive ranks divide the ranks evenly, each within one host.

    size: ``zero.hpz_partition_size``; 1 is no group. hosts: of every rank, by rank.
    """
    world = len(hosts)
    if size == 1:
        return
    key = f"zero.hpz_partition_size is {size}"
    if size > world:
        raise UserError(f"{key}, and there are {world} rank(s); give at most {world}, or 1 for no copy within a host")
    if world % size:
        raise UserError(f"{key}, which does not divide {world} ranks evenly; give a divisor of {world}")
    for first in range(0, world, size):
        found = list(dict.fromkeys(hosts[first : first + size]))
        if len(found) > 1:
            raise UserError(
                f"{key}, and ranks {first} to {first + size - 1} are on several hosts ({found[0]}, {found[1]}"
                f"{', …' if len(found) > 2 else ''}); give a divisor of the ranks per host, which are consecutive"
            )
