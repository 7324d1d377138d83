"""The choice of implementation and block sizes for a matmul: looked up, or timed once.

Lookup order: this process; the measurements that ship with the package (`tuned.json`); this machine's earlier answers,
on its own disk. Otherwise the architecture's candidates are timed: the first process to need them holds a lock, the
others on the machine wait and read its answer. The key has the row count's bucket (a power of two), so packed batches
of changing size do not tune again. Candidates that need more shared memory than the device has are never tried. One
that fails all the same is excluded with one warning, and the next is taken.

On the CPU (Triton's interpreter) nothing is timed: the first candidate is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
import triton

from .candidates import Choice, candidates_of, possible, read_choice
from .gpu_time import gpu_seconds

__all__ = [
    "FAILURES",
    "TUNED",
    "TUNING_DIR_VARIABLE",
    "Chooser",
    "Key",
    "Tuner",
    "bucket",
    "device_name",
    "device_tuner",
    "key_of",
    "nearest",
    "shipped_attention",
    "tuner",
    "tuning_folder",
    "use_tuner",
]

# The measurements that ship: {schema, devices: {device: {key: choice}}, attention: {device: {key: entry}}}.
TUNED = Path(__file__).parent.with_name("tuned.json")

TUNING_DIR_VARIABLE = "IWM_FAST_TUNING_DIR"
_REPEATS = 10
_BUCKETS = 64  # more buckets than there are
# Errors of one candidate that another may not have. Out of device memory is not among them.
FAILURES = (triton.runtime.errors.TritonError, triton.compiler.errors.CompilationError)
_held: set[Path] = set()  # folders whose lock this process holds
T = TypeVar("T")


def bucket(rows: int) -> int:
    """Return the smallest power of two ≥ `rows`, at least 16."""
    return max(16, 1 << max(0, rows - 1).bit_length())


@dataclass(frozen=True)
class Key:
    """What a choice depends on: the matmul, its dtype, the bucket of its rows, its other two sizes, and its operands.

    about: "tma" or "any" (whether tensor descriptors fit the operands), then the bias's kind and the residual.
    """

    product: str
    dtype: str
    rows: int
    columns: int
    depth: int
    about: str = "any"

    def __str__(self) -> str:
        return f"{self.product} {self.dtype} {self.rows}x{self.columns}x{self.depth} {self.about}"


def nearest(key: Key, known: Callable[[Key], T | None]) -> T | None:
    """Return what `known` has for the same matmul at the nearest number of rows (the larger of two), or None."""
    for shift in range(1, _BUCKETS):
        for rows in (key.rows << shift, key.rows >> shift):
            found = known(replace(key, rows=rows)) if rows >= bucket(0) else None
            if found is not None:
                return found
    return None


def key_of(product: str, dtype: torch.dtype, sizes: tuple[int, int, int], about: str) -> Key:
    """Return the key of a matmul of `sizes` (rows, columns, depth)."""
    return Key(product, _type_name(dtype), bucket(sizes[0]), sizes[1], sizes[2], about)


class Chooser(Protocol):
    """The launchers' interface to a tuner: make a call with the best choice."""

    def run(
        self,
        product: str,
        dtype: torch.dtype,
        sizes: tuple[int, int, int],
        call: Callable[[Choice], Any],
        about: str,
        /,
    ) -> Any:
        """Run `call` with a choice for a matmul of `sizes` (rows, columns, depth); `about`: as in `Key`."""


class Tuner:
    """Choices of one device.

    name: the device's, as a file name. folder: where answers are stored. time: seconds of a call on this device.
    shared: bytes of shared memory per program.
    """

    def __init__(
        self, name: str, architecture: str, shared: int, folder: Path, time: Callable[[Callable[[], object]], float]
    ) -> None:
        self.name, self.architecture, self.shared, self.folder, self.time = name, architecture, shared, folder, time
        self._chosen: dict[Key, Choice] = {}
        self._failed: set[tuple[Key, Choice]] = set()

    def run(
        self,
        product: str,
        dtype: torch.dtype,
        sizes: tuple[int, int, int],
        call: Callable[[Choice], T],
        about: str = "any",
    ) -> T:
        """Run `call` with the best choice for a matmul of `sizes` (rows, columns, depth), or the next that works."""
        key = key_of(product, dtype, sizes, about)
        while True:
            choice = self._chosen.get(key) or self.choose(key, dtype.itemsize, call)
            try:
                return call(choice)
            except FAILURES as error:
                self.leave_out(key, choice, error)

    def candidates(self, key: Key, element: int) -> list[Choice]:
        """Return the candidates that fit into shared memory and have not failed, the preferred one first."""
        operands = 2 if key.product == "hidden_backward" else 1
        return [
            choice
            for choice in candidates_of(self.architecture, key.product)
            if choice.shared_bytes(element, operands) <= self.shared
            and possible(choice, self.architecture, element, key.about)
            and (key, choice) not in self._failed
        ]

    def left(self, key: Key, element: int) -> list[Choice]:
        """Return the candidates; raise RuntimeError if there are none."""
        found = self.candidates(key, element)
        if not found:
            raise RuntimeError(f"no implementation of {key} works on {self.name}; set backend=reference")
        return found

    def shipped(self, key: Key, left: Sequence[Choice]) -> Choice | None:
        """Return the choice that ships with the package for a key, if it is among those left."""
        return self._known(_shipped(self.name), key, left)

    def choose(self, key: Key, element: int, call: Callable[[Choice], object]) -> Choice:
        """Return the choice for a key, looked up or timed with `call`."""
        left = self.left(key, element)
        if self.architecture == "interpreter":
            choice = left[0]
        elif _capturing():
            return self._without_timing(key, left)  # for this graph only; outside of it, it is timed
        else:
            choice = self.shipped(key, left) or self._find_out(key, left, call)
        self._chosen[key] = choice
        return choice

    def _without_timing(self, key: Key, left: Sequence[Choice]) -> Choice:
        """Return the known choice for the key, or its matmul's at the nearest number of rows, or the preferred one."""
        known = self.shipped(key, left) or self._known(_read(self._path), key, left)
        return known or nearest(key, lambda other: c if (c := self._chosen.get(other)) in left else None) or left[0]

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}-triton-{triton.__version__}.json"

    def _known(self, table: dict[str, Any], key: Key, left: Sequence[Choice]) -> Choice | None:
        choice = read_choice(table.get(str(key)))
        return choice if choice in left else None

    def _find_out(self, key: Key, left: Sequence[Choice], call: Callable[[Choice], object]) -> Choice:
        with _locked(self.folder) as writable:
            table = _read(self._path)
            known = self._known(table, key, left)
            if known is not None:
                return known
            seconds = self._measure(key, left, call)
            best = min(seconds, key=lambda choice: seconds[choice], default=left[-1])
            if writable and seconds:
                table = _read(self._path)  # another key's timing may have written to it
                kept = {str(asdict(choice)): value for choice, value in seconds.items()}
                table[str(key)] = {"choice": asdict(best), "seconds": kept}
                _keep(self._path, table)
            return best

    def _measure(self, key: Key, left: Sequence[Choice], call: Callable[[Choice], object]) -> dict[Choice, float]:
        seconds = {}
        for choice in left:
            try:
                seconds[choice] = self.time(lambda choice=choice: call(choice))  # type: ignore[misc]
            except FAILURES as error:
                self.leave_out(key, choice, error)
        return seconds

    def leave_out(self, key: Key, choice: Choice, error: BaseException) -> None:
        """Exclude a choice for a key from now on, with a warning that says why."""
        self._failed.add((key, choice))
        self._chosen.pop(key, None)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"{key} on {self.name}: {choice} excluded: {first_line}", RuntimeWarning, stacklevel=2)


def _type_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in a key; for fp32, with its matmul precision."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}-{torch.get_float32_matmul_precision()}" if dtype == torch.float32 else name


def _capturing() -> bool:
    """Return whether a CUDA graph is being captured: nothing may be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or torn: time again
        return {}
    return table if isinstance(table, dict) else {}


def _keep(path: Path, table: dict[str, Any]) -> None:
    """Write a table of answers atomically; if the disk is full, each process times for itself."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: block sizes are not stored: {error.strerror}", RuntimeWarning, stacklevel=2)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@cache
def _shipped(name: str) -> dict[str, Any]:
    return _section("devices", name)


def shipped_attention(name: str) -> dict[str, Any]:
    """Return measurements of packed attention on a GPU, by key, for `iwm_fast.models.measured_attention`."""
    return _section("attention", name)


def _section(section: str, name: str) -> dict[str, Any]:
    found = _read(TUNED).get(section, {}).get(name, {})
    return found if isinstance(found, dict) else {}


def device_name(device: torch.device) -> str:
    """Return a GPU's name as in the tables."""
    return torch.cuda.get_device_properties(device).name.replace(" ", "_").replace("/", "_")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; yield False if the folder is not writable, and each process times for itself.

    Timing a whole MLP looks up its matmuls in turn, so the lock is reentrant within the process.
    """
    if folder in _held:
        yield True
        return
    try:
        # The default is in the machine's temporary folder and private to the user; a given folder follows the umask.
        folder.mkdir(parents=True, exist_ok=True, mode=0o777 if os.environ.get(TUNING_DIR_VARIABLE) else 0o700)
        lock = (folder / ".lock").open("a")
    except OSError:
        yield False
        return
    with lock:
        # Without locks (some network file systems) several processes time at once, and the last one's file stays.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        _held.add(folder)
        try:
            yield True
        finally:
            _held.discard(folder)


def _cuda_seconds(call: Callable[[], object]) -> float:
    """Return the median seconds of a call on the current GPU, after two warm-up calls."""
    return median(gpu_seconds(lambda _: call(), _REPEATS, warm_up=2))


def tuning_folder() -> Path:
    """Return a folder on this machine's own disk: a cluster's nodes often share the home folder."""
    named = os.environ.get(TUNING_DIR_VARIABLE)
    if named:
        return Path(named).expanduser()
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # neither a temporary nor the working folder is writable: nothing is stored
        temporary = "/tmp"  # noqa: S108  (only named; that it cannot be written is found when it is opened)
    return Path(temporary) / f"iwm-fast-{os.getuid()}"


_in_place: Chooser | None = None


@contextlib.contextmanager
def use_tuner(other: Chooser) -> Iterator[None]:
    """Replace the devices' tuners by `other` inside, for the whole process: autograd's threads, which run backward
    passes, see no context variable.
    """
    global _in_place  # noqa: PLW0603 - as above
    before, _in_place = _in_place, other
    try:
        yield
    finally:
        _in_place = before


def tuner(device: torch.device) -> Chooser:
    """Return the chooser for a device."""
    return _in_place or device_tuner(device)


@cache
def device_tuner(device: torch.device) -> Tuner:
    """Return the tuner of a CUDA device, or for the CPU the interpreter's."""
    if device.type == "cpu":
        return Tuner("interpreter", "interpreter", 2**62, tuning_folder(), lambda _: 0.0)
    properties = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    name = device_name(device)
    return Tuner(name, f"sm_{properties.major}{properties.minor}", shared, tuning_folder(), _cuda_seconds)
