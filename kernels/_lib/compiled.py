"""The package's Triton kernels, and how many variants of them this process has compiled or loaded."""

from __future__ import annotations

import sys
from typing import Any

from triton.runtime.jit import JITFunction, KernelInterface

__all__ = ["compiled_variants", "triton_functions"]

_PACKAGE = __name__.rsplit(".", 2)[0]


def _functions() -> dict[str, Any]:
    """Return Triton functions in the imported modules of this package, by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{_PACKAGE}.")]
    return {name: f for module in modules for name, f in vars(module).items() if isinstance(f, KernelInterface)}


def triton_functions() -> dict[str, Any]:
    """Return the kernels that operators launch, by name: functions named `…_kernel`."""
    return {name: function for name, function in _functions().items() if name.endswith("_kernel")}


def compiled_variants() -> int:
    """Return the number of compiled kernel variants that the process holds; 0 in Triton's interpreter.

    Constant from one step to the next: a measurement or a training has warmed up.
    """
    kernels = [kernel for kernel in _functions().values() if isinstance(kernel, JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())
