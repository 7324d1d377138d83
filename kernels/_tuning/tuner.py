"""Which implementation and which block sizes a product uses: measured where it was measured, else found out once.

A choice is looked up, in this order: in this process; in the measurements that ship with the package (`tuned.json`); in
what this machine found out before, on its own disk; else the candidates of the architecture are timed, the first
process to ask holding a lock while the others on the machine wait to read its answer. The key has the row count's
bucket (a power of two), so packed batches of changing size do not tune again. Candidates that need more shared memory
than the device has are never tried. One that fails all the same is left out, named once, and the next is taken.

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
_BUCKETS = 64  # more than there are
# What a candidate may fail with that another may survive. Out of device memory is not among them.
FAILURES = (triton.runtime.errors.TritonError, triton.compiler.errors.CompilationError)
_held: set[Path] = set()  # folders whose lock this process holds
T = TypeVar("T")


def bucket(rows: int) -> int:
    """The power of two at or above `rows`, at least 16."""
    return max(16, 1 << max(0, rows - 1).bit_length())


@dataclass(frozen=True)
class Key:
    """What a choice depends on: the product, its type, its rows' bucket, its other two sizes, and its surroundings.

    about: "tma" or "any", whether descriptors can point at the operands, then the bias's kind and the residual.
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
    """What is known of the same product at the nearest other number of rows, of two as near of the larger; or None."""
    for shift in range(1, _BUCKETS):
        for rows in (key.rows << shift, key.rows >> shift):
            found = known(replace(key, rows=rows)) if rows >= bucket(0) else None
            if found is not None:
                return found
    return None


def key_of(product: str, dtype: torch.dtype, sizes: tuple[int, int, int], about: str) -> Key:
    """The key of a product of `sizes` (rows, columns, depth)."""
    return Key(product, _type_name(dtype), bucket(sizes[0]), sizes[1], sizes[2], about)


class Chooser(Protocol):
    """What the launchers ask: which choice, and to make the call with it."""

    def run(
        self,
        product: str,
        dtype: torch.dtype,
        sizes: tuple[int, int, int],
        call: Callable[[Choice], Any],
        about: str,
        /,
    ) -> Any:
        """`call` with a choice for a product of `sizes` (rows, columns, depth); `about`: as in `Key`."""


class Tuner:
    """Choices of one device.

    name: the device's, as a file name. folder: where answers are kept. time: seconds of a call, on this device.
    shared: bytes of shared memory a program may have.
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
        """`call` with the best choice for a product of `sizes` (rows, columns, depth), or the next that works."""
        key = key_of(product, dtype, sizes, about)
        while True:
            choice = self._chosen.get(key) or self.choose(key, dtype.itemsize, call)
            try:
                return call(choice)
            except FAILURES as error:
                self.leave_out(key, choice, error)

    def candidates(self, key: Key, element: int) -> list[Choice]:
        """Those that fit into shared memory and have not failed, the architecture's preferred one first."""
        operands = 2 if key.product == "hidden_backward" else 1
        return [
            choice
            for choice in candidates_of(self.architecture, key.product)
            if choice.shared_bytes(element, operands) <= self.shared
            and possible(choice, self.architecture, element, key.about)
            and (key, choice) not in self._failed
        ]

    def left(self, key: Key, element: int) -> list[Choice]:
        """The candidates, of which there is at least one."""
        found = self.candidates(key, element)
        if not found:
            raise RuntimeError(f"no implementation of {key} works on {self.name}; set backend=reference")
        return found

    def shipped(self, key: Key, left: Sequence[Choice]) -> Choice | None:
        """What was measured for a key before the package was made, where it is among those that are left."""
        return self._known(_shipped(self.name), key, left)

    def choose(self, key: Key, element: int, call: Callable[[Choice], object]) -> Choice:
        """The choice for a key, looked up or timed by `call`."""
        left = self.left(key, element)
        if self.architecture == "interpreter":
            choice = left[0]
        elif _capturing():
            return self._without_timing(key, left)  # for this graph alone: outside of it, it is found out
        else:
            choice = self.shipped(key, left) or self._find_out(key, left, call)
        self._chosen[key] = choice
        return choice

    def _without_timing(self, key: Key, left: Sequence[Choice]) -> Choice:
        """What is known of a key or, at the nearest number of rows, of its product; else the preferred candidate."""
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
                table = _read(self._path)  # the timing may have added to it
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
        """Never try a choice for a key again, and say why."""
        self._failed.add((key, choice))
        self._chosen.pop(key, None)
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"{key} on {self.name}: {choice} left out: {first_line}", RuntimeWarning, stacklevel=2)


def _type_name(dtype: torch.dtype) -> str:
    """A type for a key; of fp32, with how it is multiplied."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}-{torch.get_float32_matmul_precision()}" if dtype == torch.float32 else name


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded: nothing may be timed then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):  # not there yet, or torn: it is found out again
        return {}
    return table if isinstance(table, dict) else {}


def _keep(path: Path, table: dict[str, Any]) -> None:
    """Write a table of answers, whole or not at all; where the disk is full each process finds out by itself."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: block sizes are not kept: {error.strerror}", RuntimeWarning, stacklevel=2)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@cache
def _shipped(name: str) -> dict[str, Any]:
    return _section("devices", name)


def shipped_attention(name: str) -> dict[str, Any]:
    """What was measured of packed attention on a GPU, by key: `iwm_fast.models.measured_attention` reads it."""
    return _section("attention", name)


def _section(section: str, name: str) -> dict[str, Any]:
    found = _read(TUNED).get(section, {}).get(name, {})
    return found if isinstance(found, dict) else {}


def device_name(device: torch.device) -> str:
    """A GPU's name as tables have it."""
    return torch.cuda.get_device_properties(device).name.replace(" ", "_").replace("/", "_")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; gives False where the folder cannot be written, and each process finds out by itself.

    Timing a whole MLP asks for its products' choices in turn: a lock that this process holds is not waited for.
    """
    if folder in _held:
        yield True
        return
    try:
        # Its place in the machine's temporary folder is the user's alone; a folder that was named follows the umask.
        folder.mkdir(parents=True, exist_ok=True, mode=0o777 if os.environ.get(TUNING_DIR_VARIABLE) else 0o700)
        lock = (folder / ".lock").open("a")
    except OSError:
        yield False
        return
    with lock:
        # Without locks (some network file systems) several processes time at once, and the last to write stays.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        _held.add(folder)
        try:
            yield True
        finally:
            _held.discard(folder)


def _cuda_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the current GPU, after two that do not count."""
    return median(gpu_seconds(lambda _: call(), _REPEATS, warm_up=2))


def tuning_folder() -> Path:
    """On this machine's own disk: a home folder is often shared by a cluster's nodes."""
    named = os.environ.get(TUNING_DIR_VARIABLE)
    if named:
        return Path(named).expanduser()
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # no temporary folder can be written to, nor the working folder: nothing is kept
        temporary = "/tmp"  # noqa: S108  (only named; that it cannot be written is found when it is opened)
    return Path(temporary) / f"iwm-fast-{os.getuid()}"


_in_place: Chooser | None = None


@contextlib.contextmanager
def use_tuner(other: Chooser) -> Iterator[None]:
    """Ask `other` instead of the devices' tuners, for the process: autograd runs backward passes in threads of its own,
    which see no context variable.
    """
    global _in_place  # noqa: PLW0603 - as above
    before, _in_place = _in_place, other
    try:
        yield
    finally:
        _in_place = before


def tuner(device: torch.device) -> Chooser:
    """Whom to ask for a choice on a device."""
    return _in_place or device_tuner(device)


@cache
def device_tuner(device: torch.device) -> Tuner:
    """The tuner of a CUDA device, or of the interpreter for the CPU."""
    if device.type == "cpu":
        return Tuner("interpreter", "interpreter", 2**62, tuning_folder(), lambda _: 0.0)
    properties = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    name = device_name(device)
    return Tuner(name, f"sm_{properties.major}{properties.minor}", shared, tuning_folder(), _cuda_seconds)
