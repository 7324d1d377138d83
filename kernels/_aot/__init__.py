"""What `python -m iwm_fast.kernels.aot` is made of."""
