"""Exchange every rank's host, device and versions before the process group starts, so that an impossible job ends in
one line with the host's name.

The exchange uses the launcher's store: in the process group, a host with another backend would wait forever.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import platform
import socket
import uuid
import zlib
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
_EVERYONE = f"{_KEY}/everyone"
# The first rank may have begun to wait later, and finds out who is missing.
_LATER = datetime.timedelta(seconds=15)


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

    The first rank reads all descriptions, and leaves one text with them to the others: two or three calls per rank.
    """
    keys = [f"{_KEY}/{rank}" for rank in range(world)]
    store.set(keys[me.rank], json.dumps(asdict(me)))
    try:
        if me.rank == 0:
            store.wait(keys, timeout)
            found = {"ranks": [json.loads(text) for text in store.multi_get(keys)], "missing": []}
        else:
            store.wait([_EVERYONE], timeout + _LATER)
            found = _unpacked(store.get(_EVERYONE))
    except dist.DistError:
        found = {"ranks": [], "missing": _missing(store, keys)}
    if me.rank == 0 and world > 1:
        _leave(store, _packed(found))
    if not found["ranks"]:
        missing = ", ".join(str(rank) for rank in found["missing"] if rank != me.rank)
        raise UserError(
            f"{me.name}: rank(s) {missing or 'unknown'} of {world} did not connect within "
            f"{timeout.total_seconds():.0f} s; look at the last lines of their hosts, and at the network between them"
        )
    infos = tuple(RankInfo(**fields) for fields in found["ranks"])
    require_alike(infos)
    return infos


def _packed(found: dict[str, Any]) -> str:
    """Compressed: a thousand descriptions differ in host, pid and GPU only."""
    return base64.b64encode(zlib.compress(json.dumps(found).encode())).decode()


def _unpacked(text: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text)))
    return found


def _leave(store: dist.Store, text: str) -> None:
    """Leave it for the others; where the store is gone, they learn of that themselves."""
    with contextlib.suppress(dist.DistError):
        store.set(_EVERYONE, text)


def _missing(store: dist.Store, keys: list[str], first: int = 0) -> list[int]:
    """Return the ranks, from ``first`` on, that left no key, by halves; none where the launcher's store is gone."""
    try:
        if store.check(keys):
            return []
    except dist.DistError:
        return []
    if len(keys) == 1:
        return [first]
    half = len(keys) // 2
    return _missing(store, keys[:half], first) + _missing(store, keys[half:], first + half)


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
        seen = {file.name for file in meeting.iterdir()}
        unseen = [info.name for info in infos if str(info.rank) not in seen]
        if unseen:
            others = ", ".join(unseen)
            found = [f"{folder} is not the same folder for {others} and {infos[0].name}: use a shared file system"]
    found = gather(found)[0]
    _remove(meeting, rank)
    if found:
        raise UserError(f"{found[0]}; every rank writes its checkpoints there")


def _this_gpu() -> str:
    """Return the current GPU's UUID; for a MIG instance, its name in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.startswith("MIG-"):
        return visible.split(",")[torch.cuda.current_device()]
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _remove(meeting: Path, rank: int) -> None:
    """Each rank removes its file, and the last one the folder; the others find it not empty."""
    with contextlib.suppress(OSError):
        (meeting / str(rank)).unlink(missing_ok=True)
        meeting.rmdir()
