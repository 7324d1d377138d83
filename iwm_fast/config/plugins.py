"""Plugins: the user's own modules, imported by every process before it checks a configuration.

A plugin is the dotted name of an importable module, or the path of a .py file. Importing it registers what it adds.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from iwm_fast.errors import UserError

__all__ = ["load_plugins", "loaded_plugins", "named_plugins", "plugin_digests"]

_MODULES: dict[str, ModuleType] = {}
# What a module's own code may raise while it is imported.
_FAULTS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError, AssertionError,
    RuntimeError,
)  # fmt: skip


def load_plugins(names: Iterable[str]) -> None:
    """Import each plugin once. UserError where one is not there, or fails while it is imported."""
    for name in names:
        if name not in _MODULES:
            _MODULES[name] = _imported(name)


def named_plugins(value: object) -> tuple[str, ...]:
    """The names in a value of ``plugins``; none where it is of another type, which the configuration's check says."""
    found = tuple(value) if isinstance(value, list | tuple) else ()
    return found if all(isinstance(name, str) for name in found) else ()


def loaded_plugins() -> tuple[str, ...]:
    """The plugins of this process, as they were named: another process that loads these has the same names."""
    return tuple(_MODULES)


def plugin_digests(names: Iterable[str]) -> dict[str, str | None]:
    """By plugin the SHA-256 of its file, None where it has none; what a package imports is no part of it."""
    files = {name: getattr(_MODULES.get(name), "__file__", None) for name in names}
    return {
        name: None if file is None or not Path(file).is_file() else hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
    }


def _imported(name: str) -> ModuleType:
    if name.endswith(".py"):
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"plugins: {name}: no such file; give the path of a .py file, or the name of a module")
        if not file.stem.isidentifier():
            raise UserError(f"plugins: {name}: a module's file is named with letters, digits and _; rename it")
        module, folder = file.stem, file.parent
    else:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"plugins: {name}: no name of a module; write package.module, or the path of a .py file")
        file, module, folder = None, name, Path.cwd()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # other processes find the module by the same path
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except UserError as error:
        raise UserError(f"plugins: {name}: {error}") from error
    except _FAULTS as error:
        raise UserError(f"plugins: {name}: {_why(error, module, folder)}") from error
    other = getattr(found, "__file__", None)
    if file is not None and (other is None or not os.path.samefile(other, file)):  # noqa: PTH121  (two texts)
        raise UserError(f"plugins: {name}: a module {module} is imported from {other or 'Python'}; rename the file")
    return found


def _why(error: BaseException, module: str, folder: Path) -> str:
    """What went wrong, and where in the user's files."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{module}.".startswith(f"{error.name}."):
        return f"no module {error.name} (looked in {folder} and in Python's path); install it, or correct plugins"
    if isinstance(error, SyntaxError):
        return f"cannot be imported: {error.msg} ({error.filename}, line {error.lineno})"
    place = next(
        (f" ({frame.filename}, line {frame.lineno})" for frame in reversed(traceback.extract_tb(error.__traceback__))
         if not frame.filename.startswith("<") and Path(frame.filename).is_relative_to(folder)),
        "",
    )  # fmt: skip
    text = " ".join(str(error).split())
    return f"cannot be imported: {type(error).__name__}{f': {text}' if text else ''}{place}"
