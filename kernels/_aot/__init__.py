"""Parts of `python -m iwm_fast.kernels.aot`."""
