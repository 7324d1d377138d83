"""Exchange what every rank is before they join, so that an impossible job ends in one line with the host's name.

The ranks meet in the launcher's store first: a host with another backend would otherwise wait for the rest forever.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from iwm_fast.environment import installed_version
from iwm_fast.errors import UserError, because
from iwm_fast.version import __version__

__all__ = ["Peer", "meet", "require_alike", "require_shared", "this_peer"]

_MUST_AGREE = ("torch", "triton", "deepspeed", "nvidia-dali-cuda130", "xformers", "safetensors", "numpy")
_KEY = "iwm_fast/launch"


@dataclass(frozen=True)
class Peer:
    """One rank as the others see it. devices: GPUs visible to it; device: the name of its own, or "cpu"."""

    rank: int
    host: str
    pid: int
    backend: str
    device: str
    devices: int
    local_world: int
    versions: dict[str, str | None]
    # The GPU's unique id, or "" for a rank without one.
    gpu: str = ""

    @property
    def name(self) -> str:
        """Its name in errors and warnings."""
        return f"rank {self.rank} on {self.host}"


def this_peer(rank: int, local_world: int, backend: str) -> Peer:
    """Describe this process."""
    on_gpu = backend == "nccl"
    versions = {package: installed_version(package) for package in _MUST_AGREE}
    return Peer(
        rank,
        socket.gethostname(),
        os.getpid(),
        backend,
        torch.cuda.get_device_name() if on_gpu else "cpu",
        torch.cuda.device_count() if on_gpu else 0,
        local_world,
        {"iwm-fast": __version__, "python": platform.python_version(), **versions},
        _this_gpu() if on_gpu else "",
    )


def meet(store: dist.Store, me: Peer, world: int, timeout: datetime.timedelta) -> tuple[Peer, ...]:
    """Return every rank's description, by rank. Raises UserError where some do not connect in time, or cannot work
    together.
    """
    store.set(f"{_KEY}/{me.rank}", json.dumps(asdict(me)))
    keys = [f"{_KEY}/{rank}" for rank in range(world)]
    try:
        store.wait(keys, timeout)
    except dist.DistError as error:
        missing = [str(rank) for rank in range(world) if rank != me.rank and not _there(store, keys[rank])]
        raise UserError(
            f"{me.name}: rank(s) {', '.join(missing) or 'unknown'} of {world} did not come within "
            f"{timeout.total_seconds():.0f} s; look at their hosts' own last lines, and at the network between them"
        ) from error
    peers = tuple(Peer(**json.loads(store.get(key))) for key in keys)
    require_alike(peers)
    return peers


def require_alike(peers: tuple[Peer, ...]) -> None:
    """Raise UserError where ranks differ in backend, kind of GPU or versions, or two share one GPU; it names
    the hosts.
    """
    first = peers[0]
    for peer in peers[1:]:
        if peer.backend != first.backend:
            raise UserError(
                f"{peer.name} runs on {peer.device} ({peer.backend}), {first.name} on {first.device} "
                f"({first.backend}): look at the driver and at CUDA_VISIBLE_DEVICES there (iwm-fast doctor)"
            )
        for package, version in first.versions.items():
            if peer.versions.get(package) != version:
                raise UserError(
                    f"{peer.name} has {package} {peer.versions.get(package)}, {first.name} has {version}: "
                    "install the same on all hosts"
                )
        if peer.device != first.device:
            raise UserError(
                f"{peer.name} has a {peer.device}, {first.name} a {first.device}: start ranks on one kind of GPU"
            )
    owners: dict[str, Peer] = {}
    for peer in peers:
        owner = owners.setdefault(peer.gpu, peer)
        if peer.gpu and owner is not peer:
            raise UserError(
                f"{owner.name} and {peer.name} would share one GPU: start at most one process per GPU (look at "
                "CUDA_VISIBLE_DEVICES and LOCAL_RANK there)"
            )


def require_shared(folder: Path, peers: tuple[Peer, ...], rank: int, gather: Callable[[Any], list[Any]]) -> None:
    """Raise UserError on every rank unless all can write to the folder and the first sees what they wrote.

    `gather` returns every rank's value, by rank, to all.
    """
    token = gather(uuid.uuid4().hex)[0]
    meeting = folder / f".meeting-{token}"
    wrong: str | None = None
    try:
        meeting.mkdir(parents=True, exist_ok=True)
        (meeting / str(rank)).touch()
    except OSError as error:
        wrong = f"{peers[rank].name} cannot write to {folder}: {because(error)}"
    found = [said for said in gather(wrong) if said]
    if not found and rank == 0:
        unseen = [peer.name for peer in peers if not (meeting / str(peer.rank)).exists()]
        if unseen:
            found = [f"{folder} is another folder for {', '.join(unseen)} than for {peers[0].name}: share it"]
    found = gather(found)[0]
    _remove(meeting)
    if found:
        raise UserError(f"{found[0]}; every rank writes its checkpoints there")


def _this_gpu() -> str:
    """The current GPU's UUID; of a MIG part, the name by which it is visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.startswith("MIG-"):
        return visible.split(",")[torch.cuda.current_device()]
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _there(store: dist.Store, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except dist.DistError:
        return False


def _remove(meeting: Path) -> None:
    """The last rank removes it; the others find it gone or not empty."""
    try:
        for file in meeting.iterdir():
            file.unlink(missing_ok=True)
        meeting.rmdir()
    except OSError:
        return
