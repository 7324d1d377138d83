"""Ranks, devices and the process group: alone, under torchrun, deepspeed or SLURM, on GPUs or CPUs."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from iwm_fast.engine.distributed.messages import bytes_of_first, meet_all
from iwm_fast.engine.distributed.pulses import announce
from iwm_fast.engine.distributed.rank_environment import ALONE, device_index, place_of
from iwm_fast.engine.distributed.rank_info import RankInfo, meet, this_rank
from iwm_fast.engine.distributed.signals import end_with_parent
from iwm_fast.errors import UserError

__all__ = ["Ranks", "agree", "decide", "gather", "leave", "of_first", "start"]

Decided = TypeVar("Decided")

# Longer than the limits of launch and of silence, so that the library times out only after the rank has been named.
_START_S, _MARGIN_S = 600.0, 60.0
# Seconds in which the ranks of one launch connect; after them, print what this rank waits for.
_SILENT_S = 20.0
# Ranks end together; one that does not arrive has failed after its last step.
_LEAVE_S = 10.0


@dataclass(frozen=True)
class Ranks:
    """The process's rank, device and process groups."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    # For small host messages; on GPUs a gloo group of its own, so that they do not wait for the device.
    control: dist.ProcessGroup | None = None
    # Every rank's host, versions and device, by rank.
    infos: tuple[RankInfo, ...] = ()
    # torchrun, deepspeed, slurm, another that sets RANK ("environment"), or "alone".
    launcher: str = "alone"
    # The launcher's store, in which all ranks have met; None for a rank alone.
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def start(timeout_s: float = 600.0, *, alone: bool = False) -> Ranks:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and prepare DeepSpeed's accelerator; call before importing
    deepspeed.

    ``timeout_s``: seconds that a rank may be silent (``train.rank_timeout_s``). ``alone``: as the only rank, whatever
    launcher the environment names. Raises UserError where that environment contradicts itself.
    """
    place = ALONE if alone else place_of(os.environ)
    rank, world, local_world = place.rank, place.world, place.local_world
    if place.note:
        print(f"iwm-fast: {place.note}", file=sys.stderr, flush=True)
    if world > 1:
        end_with_parent()  # before the rendezvous, which a dead launcher no longer holds
    on_gpu = torch.cuda.is_available()
    index = device_index(place, torch.cuda.device_count()) if on_gpu else place.local_rank
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    # DeepSpeed takes its GPU from LOCAL_RANK, and requires Open MPI's to agree.
    os.environ["LOCAL_RANK"] = str(index)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    if on_gpu:
        torch.cuda.set_device(index)
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    # Each gloo group would connect every rank to every other, and two groups of a thousand ranks exceed most limits of
    # open files. With this a connection is opened by its first message.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # oneDNN, and PyTorch above it, keep what they made for 1,024 shapes. Packed batches have other shapes in each step,
    # so it is never used again, and grows to gigabytes; within a step a few dozen shapes come several times.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        timeout = datetime.timedelta(seconds=max(timeout_s, _START_S) + _MARGIN_S)
        # A rank alone opens no port.
        with _waiting(rank, world):
            store = dist.HashStore() if world == 1 else _rendezvous(rank, world, timeout)
            announce(store, rank)
            infos = meet(store, this_rank(rank, local_world, backend), world, timeout)
        with _connecting(infos[rank], backend):
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    else:  # a second training in this process
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (has no public name)
        announce(store, rank)
        infos = _gathered_infos(this_rank(rank, local_world, dist.get_backend()), world)
    with _connecting(infos[rank], "gloo"):
        control = dist.new_group(backend="gloo") if on_gpu and world > 1 else None
        meet_all(world, control)
    met = store if world > 1 else None
    return Ranks(rank, world, place.local_rank, local_world, device, control, infos, place.launcher, met)


def leave() -> None:
    """Leave the process group, where all ranks come to their end; NCCL warns otherwise. Do not call it after an error:
    other ranks may be in a collective.

    The first rank, which may hold the store, leaves last.
    """
    if not dist.is_initialized():
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    store: dist.Store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (has no public name)
    dist.destroy_process_group()
    if world == 1:
        return
    with contextlib.suppress(dist.DistError):  # an agent that holds the store may have exited
        store.set(f"iwm_fast/left/{rank}", "")
        if rank == 0:
            store.wait([f"iwm_fast/left/{other}" for other in range(world)], datetime.timedelta(seconds=_LEAVE_S))


@contextlib.contextmanager
def _connecting(me: RankInfo, backend: str) -> Iterator[None]:
    """Around a group's first connections: where they fail, a UserError says what to look at."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{me.name}: no connection to the other ranks ({reason}); look at the network between the "
            f"hosts, and at {backend.upper()}_SOCKET_IFNAME, the interface that is used"
        ) from error


@contextlib.contextmanager
def _waiting(rank: int, world: int) -> Iterator[None]:
    """While waiting for the other ranks, print once what a long wait is for."""

    def tell() -> None:
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT")
        print(
            f"rank {rank} of {world}: waiting for the other ranks at {address}:{port}{_unknown(address)}; "
            "where none was started, the environment has a launcher's variables: unset RANK and WORLD_SIZE to train "
            "alone",
            file=sys.stderr,
            flush=True,
        )

    patience = threading.Timer(_SILENT_S, tell)
    patience.daemon = True
    if world > 1:
        patience.start()
    try:
        yield
    finally:
        patience.cancel()


def _unknown(host: str) -> str:
    """A remark where a host name does not resolve; it may later, as those of pods do."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f" (which is not found here: {error.strerror})"
    return ""


def _rendezvous(rank: int, world: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's store, at MASTER_ADDR and MASTER_PORT."""
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
    """Return every rank's value, by rank; all ranks call it."""
    found = [value] * world
    if world > 1:
        dist.all_gather_object(found, value, group=group)
    return found


def _gathered_infos(me: RankInfo, world: int) -> tuple[RankInfo, ...]:
    return tuple(gather(me, world))


def agree(ranks: Ranks, *flags: bool) -> list[bool]:
    """Return for each flag whether any rank has it; every rank gets the same result."""
    if ranks.world == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=ranks.control)
    return [bool(vote) for vote in votes.tolist()]


def of_first(value: Decided, ranks: Ranks) -> Decided:
    """Return the first rank's value on all ranks, which all call it; the others' are not sent."""
    if ranks.world == 1:
        return value
    sent = pickle.dumps(value) if ranks.first else b""
    found: Decided = pickle.loads(bytes_of_first(sent, ranks.rank, ranks.world, ranks.control))  # noqa: S301  (a rank's)
    return found


def decide(ranks: Ranks, choose: Callable[[], Decided]) -> Decided:
    """Return the first rank's result of `choose` on all ranks, which all call it; its UserError ends every rank."""
    answer: list[Any] = [None, None]
    if ranks.first:
        try:
            answer[0] = choose()
        except UserError as error:
            answer[1] = str(error)
    answer = of_first(answer, ranks)
    if answer[1] is not None:
        raise UserError(answer[1])
    decided: Decided = answer[0]
    return decided
