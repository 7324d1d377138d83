"""Exchange every rank's host, device and versions before the process group starts, so that an impossible job ends in
one line with the host's name.

The exchange uses the launcher's store: in the process group, a host with another backend would wait forever.
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

__all__ = ["RankInfo", "meet", "require_alike", "require_shared", "this_rank"]

_MUST_AGREE = ("torch", "triton", "deepspeed", "nvidia-dali-cuda130", "xformers", "safetensors", "numpy")
_KEY = "iwm_fast/launch"


@dataclass(frozen=True)
class RankInfo:
    """Host, device and versions of a rank. devices: GPUs visible to it; device: the name of its GPU, or "cpu"."""

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
        """The rank's name in errors and warnings."""
        return f"rank {self.rank} on {self.host}"


def this_rank(rank: int, local_world: int, backend: str) -> RankInfo:
    """Describe this process."""
    on_gpu = backend == "nccl"
    versions = {package: installed_version(package) for package in _MUST_AGREE}
    return RankInfo(
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


def meet(store: dist.Store, me: RankInfo, world: int, timeout: datetime.timedelta) -> tuple[RankInfo, ...]:
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
            f"{me.name}: rank(s) {', '.join(missing) or 'unknown'} of {world} did not connect within "
            f"{timeout.total_seconds():.0f} s; look at the last lines of their hosts, and at the network between them"
        ) from error
    infos = tuple(RankInfo(**json.loads(store.get(key))) for key in keys)
    require_alike(infos)
    return infos


def require_alike(infos: tuple[RankInfo, ...]) -> None:
    """Raise UserError, with the hosts' names, if ranks differ in backend, GPU model or versions, or two share a GPU."""
    first = infos[0]
    for info in infos[1:]:
        if info.backend != first.backend:
            raise UserError(
                f"{info.name} runs on {info.device} ({info.backend}), {first.name} on {first.device} "
                f"({first.backend}): look at the driver and at CUDA_VISIBLE_DEVICES there (iwm-fast doctor)"
            )
        for package, version in first.versions.items():
            if info.versions.get(package) != version:
                raise UserError(
                    f"{info.name} has {package} {info.versions.get(package)}, {first.name} has {version}: "
                    "install the same on all hosts"
                )
        if info.device != first.device:
            raise UserError(
                f"{info.name} has a {info.device}, {first.name} a {first.device}: start ranks on one GPU model"
            )
    owners: dict[str, RankInfo] = {}
    for info in infos:
        owner = owners.setdefault(info.gpu, info)
        if info.gpu and owner is not info:
            raise UserError(
                f"{owner.name} and {info.name} would share one GPU: start at most one process per GPU (look at "
                "CUDA_VISIBLE_DEVICES and LOCAL_RANK there)"
            )


def require_shared(folder: Path, infos: tuple[RankInfo, ...], rank: int, gather: Callable[[Any], list[Any]]) -> None:
    """Raise UserError on every rank unless all ranks can write to the folder and the first sees their files.

    `gather` returns the values of all ranks, in order, on every rank.
    """
    token = gather(uuid.uuid4().hex)[0]
    meeting = folder / f".meeting-{token}"
    wrong: str | None = None
    try:
        meeting.mkdir(parents=True, exist_ok=True)
        (meeting / str(rank)).touch()
    except OSError as error:
        wrong = f"{infos[rank].name} cannot write to {folder}: {because(error)}"
    found = [said for said in gather(wrong) if said]
    if not found and rank == 0:
        unseen = [info.name for info in infos if not (meeting / str(info.rank)).exists()]
        if unseen:
            others = ", ".join(unseen)
            found = [f"{folder} is not the same folder for {others} and {infos[0].name}: use a shared file system"]
    found = gather(found)[0]
    _remove(meeting)
    if found:
        raise UserError(f"{found[0]}; every rank writes its checkpoints there")


def _this_gpu() -> str:
    """Return the current GPU's UUID; for a MIG instance, its name in CUDA_VISIBLE_DEVICES."""
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
