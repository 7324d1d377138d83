"""The layers: which package may import which, as a table, and checks that find violations.

Checks read the modules' syntax trees and import nothing. A room is a package below ``iwm_fast``, or a module there;
``kernels``, ``configs`` and ``benchmarks`` are at the root and are imported as ``iwm_fast.kernels`` ....
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

PACKAGE = "iwm_fast"
AT_THE_ROOT = ("kernels", "configs", "benchmarks")

# What every room except kernels may import: modules that import the standard library, rich, NumPy and each other.
GROUND = (
    "atomic_files", "console", "environment", "errors", "file_locks", "file_names", "log_filters", "long_work",
    "notices", "outputs", "parent_process", "programs", "results", "streams", "version",
)  # fmt: skip

# A room, and the rooms that it may import: those further down.
ROOMS: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "config": (),
    "actions": ("config",),
    "models": ("actions", "config", "kernels"),
    "games": ("config",),
    "data": ("games", "actions", "config", "kernels"),
    "families": ("models", "config"),
    "cost": ("data", "models", "actions", "config", "kernels"),
    "engine": ("cost", "data", "families", "models", "actions", "config", "kernels"),
    "eval": ("engine", "cost", "data", "games", "models", "actions", "config", "kernels"),
    "export": ("eval", "engine", "data", "families", "models", "actions", "config", "kernels"),
    "measure": ("engine", "cost", "data", "models", "actions", "config", "kernels"),
    "api": ("eval", "engine", "data", "models", "actions", "config", "kernels"),
    "benchmarks": (
        "measure", "eval", "export", "engine", "cost", "data", "games", "models", "actions", "config", "kernels",
    ),
    "cli": (
        "benchmarks", "api", "measure", "eval", "export", "engine", "cost", "data", "models", "actions", "config",
        "kernels",
    ),
}  # fmt: skip
# Of the ground, for rooms that may not import all of it.
GROUND_OF: dict[str, tuple[str, ...]] = {"kernels": (), "config": ("errors",)}
# Beside the rooms: the package's __init__, its entry points, and tools.
FACES: dict[str, tuple[str, ...]] = {
    "__init__": ("api", "errors", "parent_process", "version"),
    "__main__": ("cli",),
    "tools": ("__init__", *ROOMS, *GROUND),  # generates the page of the command line
    "examples": ("__init__", *(room for room in ROOMS if room != "cli")),
    "setup": (),
}

# Libraries that may be imported at module level, beside the standard library; rooms not named here may import any.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "iwm_fast.kernels": ("torch", "triton", "numpy"),
    "iwm_fast.actions.transforms": ("numpy",),
    **{f"iwm_fast.{leaf}": ("rich", "numpy") for leaf in GROUND},
}

LONGEST = 400  # lines of a module


@dataclass(frozen=True)
class Import:
    """One name that a module imports: a module, or a name of a package's ``__init__``.

    late: imported in a function, or for type checkers only, so not at import time.
    """

    line: int
    name: str
    late: bool


@dataclass(frozen=True)
class Module:
    """A file as the checks read it."""

    file: str
    name: str
    lines: int
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        """The room that contains it, or its name in `FACES`."""
        parts = self.name.split(".")
        if parts[0] != PACKAGE:
            return parts[0]
        return parts[1] if len(parts) > 1 else "__init__"


def read_house(sources: Mapping[str, str]) -> list[Module]:
    """Return the modules of a tree, from their texts by file."""
    names = {file: _module_name(file) for file in sources}
    known = set(names.values())
    return [
        Module(file, names[file], text.count("\n"), tuple(_imports(ast.parse(text, file), file, names[file], known)))
        for file, text in sources.items()
    ]


def _module_name(file: str) -> str:
    parts = list(PurePosixPath(file).with_suffix("").parts)
    if parts[0] in AT_THE_ROOT:
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, file: str, name: str, known: set[str]) -> Iterator[Import]:
    package = name.split(".") if file.endswith("__init__.py") else name.split(".")[:-1]

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(child.lineno, alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    below = f"{base}.{alias.name}"
                    yield Import(child.lineno, below if below in known else base, late)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(ast.Module(child.body, []), True)
                yield from walk(ast.Module(child.orelse, []), late)
            else:
                yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(tree, False)


def _room_of(name: str) -> str | None:
    """Return the room of an imported module, ``__init__`` for the package itself; None for foreign ones."""
    parts = name.split(".")
    if parts[0] in ("tools", "examples"):
        return parts[0]
    if parts[0] in AT_THE_ROOT:
        return parts[0]
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def crossed_borders(house: list[Module]) -> list[str]:
    """Return imports against the layers, and rooms that no table has."""
    faults = []
    for module in house:
        room = module.room
        if room in GROUND:
            allowed = {*GROUND}
        elif room in ROOMS:
            allowed = {room, *ROOMS[room], *GROUND_OF.get(room, GROUND)}
        elif room in FACES:
            allowed = {room, *FACES[room]}
        else:
            faults.append(f"{module.file}:1: {room} is a room that ROOMS, GROUND and FACES do not name")
            continue
        for one in module.imports:
            other = _room_of(one.name)
            if other is None or other in allowed:
                continue
            rule = f"there is no arrow from {room} to {other}"
            if room in GROUND:
                rule = "the ground imports only the ground"
            if other == "__init__":
                rule = "version and parent_process hold the facts of iwm_fast/__init__, api its model"
            faults.append(f"{module.file}:{one.line}: {room} imports {one.name}; {rule}")
    return faults


def foreign_libraries(house: list[Module]) -> list[str]:
    """Return libraries imported at module level that `LIBRARIES` does not allow."""
    faults = []
    for module in house:
        owner = next((k for k in LIBRARIES if module.name == k or module.name.startswith(f"{k}.")), None)
        if owner is None:
            continue
        for one in module.imports:
            library = one.name.split(".")[0]
            ours = _room_of(one.name) is not None
            if one.late or ours or library in LIBRARIES[owner] or library in sys.stdlib_module_names:
                continue
            allowed = ", ".join(LIBRARIES[owner])
            faults.append(f"{module.file}:{one.line}: imports {one.name}; at module level {owner} imports {allowed}")
    return faults


def long_modules(house: list[Module]) -> list[str]:
    """Return modules of more than `LONGEST` lines."""
    return [
        f"{module.file}:{module.lines}: a module has at most {LONGEST} lines; look for the second job in it"
        for module in house
        if module.lines > LONGEST
    ]


def package_circles(house: list[Module]) -> list[str]:
    """Return cycles between packages, or between a package and modules beside it, late imports included."""
    known = {module.name for module in house}
    # For each package, the imports between its parts; "" is the package itself.
    arrows: dict[str, dict[str, dict[str, str]]] = {}
    for module in house:
        for one in module.imports:
            above, ours, theirs = _parted(module.name, one.name)
            if one.name in known and ours and theirs:
                within = arrows.setdefault(".".join(above), {})
                within.setdefault(ours, {}).setdefault(theirs, f"{module.file}:{one.line}")
    parents = {name.rpartition(".")[0] for name in known}
    return [
        f"{circle}: packages import each other in a circle"
        for above, within in arrows.items()
        for circle in _circles(within, [node for node in within if f"{above}.{node}".strip(".") in parents])
    ]


def _parted(ours: str, theirs: str) -> tuple[list[str], str, str]:
    """Return the package that contains two modules, and their names below it, "" if one is the package."""
    a, b = ours.split("."), theirs.split(".")
    above = [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]
    return above, *(".".join(name[len(above) : len(above) + 1]) for name in (a, b))


def module_circles(house: list[Module]) -> list[str]:
    """Return cycles between modules at import time.

    That a package's ``__init__`` runs before its modules does not count, but importing a name from it does.
    """
    known = {module.name for module in house}
    arrows: dict[str, dict[str, str]] = {}
    for module in house:
        for one in module.imports:
            if not one.late and one.name in known and one.name != module.name:
                arrows.setdefault(module.name, {}).setdefault(one.name, f"{module.file}:{one.line}")
    return [f"{circle}: modules import each other in a circle" for circle in _circles(arrows, arrows)]


def _circles(arrows: Mapping[str, Mapping[str, str]], nodes: Iterable[str]) -> list[str]:
    """Return cycles, at least one through each node that is in any: their edges, and where each is."""
    found = {}
    for node in nodes:
        paths, ahead = {node: [node]}, [node]
        for place in ahead:  # grows meanwhile: nearest first
            for other in arrows.get(place, {}):
                if other == node:
                    circle = [*paths[place], node]
                    found.setdefault(frozenset(circle), circle)
                if other not in paths:
                    paths[other] = [*paths[place], other]
                    ahead.append(other)
            if any(node in circle for circle in found):
                break
    return [", ".join(f"{arrows[a][b]}: {a} → {b}" for a, b in itertools.pairwise(circle)) for circle in found.values()]
