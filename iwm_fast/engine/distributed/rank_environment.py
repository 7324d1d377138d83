"""Find this process's rank in the variables of its launcher: torchrun, deepspeed, srun, or none.

Variables outlive the launcher that set them: a batch script has SLURM's, an old shell a MASTER_ADDR. A process is one
of several ranks only where its launcher set all of them; a contradiction is a UserError before any rank waits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from iwm_fast.errors import UserError

__all__ = ["ALONE", "Place", "device_index", "place_of"]

# SLURM's own steps, from 4294967290: the shell of salloc, the batch script, and others without tasks.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LARGEST_PORT = 65535
# SLURM_STEP_TASKS_PER_NODE: "8(x2),4" is 8, 8 and 4.
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class Place:
    """A process's rank among all. launcher: where it comes from. note: a line for the user, or None."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = "alone"
    note: str | None = None


ALONE = Place()


def place_of(env: Mapping[str, str]) -> Place:
    """Return the process's place from environment variables. Raises UserError where they are incomplete or
    contradictory.

    RANK and WORLD_SIZE come first, then a task of `srun`. SLURM's variables without a step of `srun` (a batch script,
    the shell of `salloc`) leave the process alone, with a note. One of several processes of `mpirun` is refused.
    """
    slurm_step = _in_slurm_step(env)
    if "RANK" in env or ("WORLD_SIZE" in env and not slurm_step):
        return _of_variables(env)
    if slurm_step:
        return _of_slurm(env)
    for name in _MPI_SIZES:
        if _number_or_none(env.get(name)) not in (None, 0, 1):
            raise UserError(
                f"{name} is {env[name]}: iwm-fast does not join the ranks of mpirun; start them with torchrun, or set "
                f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process; to train alone, unset "
                f"{name}"
            )
    return Place(note=_batch_note(env))


def device_index(place: Place, visible: int) -> int:
    """Return the index of this rank's GPU among the visible ones. Raises UserError where there is none.

    A launcher may show every task only its own GPU: that is index 0, whatever the local rank. Ranks check that no two
    share a GPU when they meet.
    """
    if place.world == 1 or visible == 1:
        return 0
    if place.local_rank >= visible:
        raise UserError(
            f"rank {place.rank}: local rank {place.local_rank} has no GPU of its own, {visible} are visible; start at "
            "most one process per GPU"
        )
    return place.local_rank


def _of_variables(env: Mapping[str, str]) -> Place:
    """From RANK and WORLD_SIZE, which torchrun and deepspeed set."""
    if "WORLD_SIZE" not in env:
        raise UserError(f"RANK is {env['RANK']!r} and WORLD_SIZE is not set: set both, or unset RANK to train alone")
    world = _count(env, "WORLD_SIZE")
    if "RANK" not in env:
        if world > 1:
            raise UserError(
                f"WORLD_SIZE is {world} and RANK is not set: set both for each process (torchrun does), or unset "
                "WORLD_SIZE to train alone"
            )
        return ALONE
    rank = _number(env, "RANK")
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world}: ranks count from 0 to {world - 1}")
    sizes = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env]
    local_rank = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
    local_world = _count(env, sizes[0]) if sizes else 1
    if sizes and local_rank >= local_world:
        raise UserError(
            f"LOCAL_RANK is {local_rank} and {sizes[0]} is {local_world}: a host's ranks count from 0 to "
            f"{local_world - 1}"
        )
    elastic, crossed = "TORCHELASTIC_RUN_ID" in env, "CROSS_SIZE" in env
    launcher = "torchrun" if elastic else "deepspeed" if crossed else "environment"
    if world > 1:
        _require_rendezvous(env, "set both to the first rank's host and a free port there")
    return Place(rank, world, local_rank, local_world, launcher)


def _of_slurm(env: Mapping[str, str]) -> Place:
    """From the variables of a task of `srun`."""
    world = _slurm_tasks(env)
    rank = _number(env, "SLURM_PROCID")
    if "WORLD_SIZE" in env and _count(env, "WORLD_SIZE") != world:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} and this srun has {world} tasks: unset WORLD_SIZE, or set RANK too"
        )
    if rank >= world:
        raise UserError(f"SLURM_PROCID is {rank} and srun has {world} tasks: start the ranks with one srun")
    local_rank = _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else 0
    if world > 1:
        _require_rendezvous(
            env, "export both in the batch script (first host, any free port), or train alone with srun --ntasks=1"
        )
    return Place(rank, world, local_rank, max(_tasks_here(env), local_rank + 1), "slurm" if world > 1 else "alone")


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as a task: a batch script and the shell of `salloc` have no step, or one of
    SLURM's own.
    """
    number = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if "SLURM_PROCID" not in env or number is None:
        return "SLURM_PROCID" in env and "SLURM_SRUN_COMM_HOST" in env
    step = _number_or_none(number)
    return step is not None and step < _FIRST_SPECIAL_STEP


def _slurm_tasks(env: Mapping[str, str]) -> int:
    return next((_count(env, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env), 1)


def _tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of this step on this host."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = _TASKS.fullmatch(part.strip())
        if match is None:
            return _number_or_none(env.get("SLURM_NTASKS_PER_NODE")) or 1
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number_or_none(env.get("SLURM_NODEID")) or 0
    return counts[node] if node < len(counts) else 1


def _batch_note(env: Mapping[str, str]) -> str | None:
    """The note for an allocation of several tasks, none of which is this process."""
    tasks = _number_or_none(env.get("SLURM_NTASKS"))
    if "SLURM_JOB_ID" not in env or tasks is None or tasks < 2:
        return None
    return (
        f"this SLURM job has {tasks} tasks, and srun did not start this process: it trains alone, on one device; for "
        f"{tasks} ranks write srun iwm-fast pretrain"
    )


def _require_rendezvous(env: Mapping[str, str], advice: str) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name, "").strip()]
    if missing:
        raise UserError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: {advice}")
    port = _number_or_none(env["MASTER_PORT"])
    if port is None or not 1 <= port <= _LARGEST_PORT:
        raise UserError(f"MASTER_PORT is {env['MASTER_PORT']!r}; it must be a whole number from 1 to {_LARGEST_PORT}")


def _count(env: Mapping[str, str], name: str) -> int:
    return _number(env, name, least=1)


def _number(env: Mapping[str, str], name: str, *, least: int = 0) -> int:
    text = env.get(name, "")
    value = _number_or_none(text)
    if value is None or value < least:
        raise UserError(
            f"{name} is {'empty' if not text.strip() else repr(text)}; it must be a whole number of at least {least} "
            "(the launcher sets it; without one, unset it)"
        )
    return value


def _number_or_none(text: str | None) -> int | None:
    """None where the text is no whole number of ASCII digits."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() else None
