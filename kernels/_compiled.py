"""How many kernels this process has compiled or loaded: whether a measurement, or a training, has settled."""

from __future__ import annotations

import sys

from triton.runtime.jit import JITFunction

__all__ = ["compiled_variants"]


def compiled_variants() -> int:
    """Kernels of this package that the process holds, each for one kind of arguments; 0 in Triton's interpreter."""
    package = __name__.rpartition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    kernels = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, JITFunction)}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())
