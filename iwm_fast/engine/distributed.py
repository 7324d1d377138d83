"""Ranks, devices and the process group: alone, under torchrun, the deepspeed launcher or SLURM, on GPUs or on CPUs."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.engine.launch import Peer, meet, this_peer
from iwm_fast.engine.signals import end_with_parent
from iwm_fast.errors import UserError

__all__ = ["Ranks", "agree", "gather", "start"]

# The library gives up last: after a start's time or the time that a rank may be silent, when the rank has been named.
_START_S, _MARGIN_S = 600.0, 60.0


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    # Small host-side messages; on GPUs a gloo group of its own, so that asking does not wait for the device.
    control: dist.ProcessGroup | None = None
    # Every rank's host, versions and device, by rank.
    peers: tuple[Peer, ...] = ()

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def _environment() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) from torchrun's or deepspeed's variables, else SLURM's, else alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return (
            int(env["RANK"]),
            world,
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1))),
        )
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise UserError(
                "SLURM: MASTER_ADDR and MASTER_PORT are not set; export them in the batch script "
                "(first host, any free port)"
            )
        tasks = int(env.get("SLURM_NTASKS_PER_NODE", 1))
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)), tasks
    return 0, 1, 0, 1


def start(timeout_s: float = 600.0) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and prepare DeepSpeed's accelerator; call before importing
    deepspeed. ``timeout_s``: seconds that a rank may be silent (``train.rank_timeout_s``).
    """
    rank, world, local_rank, local_world = _environment()
    if world > 1:
        end_with_parent()  # before waiting for the others, whose rendezvous a dead launcher does not hold any more
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed asserts that it is there
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank}: local rank {local_rank} has no GPU of its own, "
                f"{torch.cuda.device_count()} visible; start one process a GPU"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        timeout = datetime.timedelta(seconds=max(timeout_s, _START_S) + _MARGIN_S)
        # No port is opened when there is nobody to talk to.
        store = dist.HashStore() if world == 1 else _rendezvous(rank, world, timeout)
        peers = meet(store, this_peer(rank, local_world, backend), world, timeout)
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{peers[rank].name}: no connection to the other ranks ({reason}); look at the network between the "
                f"hosts, and at {backend.upper()}_SOCKET_IFNAME, the interface that is used"
            ) from error
    else:  # a second training of this process
        peers = _peers_again(this_peer(rank, local_world, dist.get_backend()), world)
    control = dist.new_group(backend="gloo") if on_gpu and world > 1 else None
    return Ranks(rank, world, local_rank, local_world, device, control, peers)


def _rendezvous(rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's store, under MASTER_ADDR and MASTER_PORT."""
    try:
        store: dist.Store = next(dist.rendezvous("env://", rank, world, timeout=timeout))[0]
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = " ".join(str(error).split())
        raise UserError(
            f"rank {rank}: no rendezvous at {where} ({reason}); is the first host up and reachable?"
        ) from error
    return dist.PrefixStore("iwm_fast", store)


def gather(value: Any, world: int, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank; all ranks call it."""
    found = [value] * world
    if world > 1:
        dist.all_gather_object(found, value, group=group)
    return found


def _peers_again(me: Peer, world: int) -> tuple[Peer, ...]:
    return tuple(gather(me, world))


def agree(ranks: Ranks, *flags: bool) -> list[bool]:
    """For each flag, whether it holds on any rank; every rank gets the same answers."""
    if ranks.world == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=ranks.control)
    return [bool(vote) for vote in votes.tolist()]
