"""A null GPU: the CUDA path of iwm-fast walked through on a machine without a GPU.

Small libraries in place of the CUDA driver and runtime, cuBLAS, cuDNN, cuSOLVER and NCCL report H200s, give out host
memory as the device's, copy as asked, and answer success to every launch without computing anything. PyTorch's CUDA
build, Triton's compiler and launcher, xformers' dispatch and DeepSpeed's CUDA accelerator run for real over them.

    python -m tools.nullgpu setup                   # once, 5 GB: a virtual environment with the CUDA build of PyTorch
    python -m tools.nullgpu build                   # the libraries, with gcc, in seconds
    python -m tools.nullgpu matrix ['bf16 stage 1'] # trainings of three steps through stages, precisions and options
    python -m tools.nullgpu step gpu-base zero.stage=0 [--json FILE]   # what a step launches, waits for and costs
    python -m tools.nullgpu baseline --out benchmarks/results          # that of every preset at stages 0 to 2
    python -m tools.nullgpu run -m benchmarks.gpu_suite --out OUT      # any program

``NULLGPU`` names the folder of environment, libraries and caches (default: nullgpu in the temporary folder),
``NULLGPU_PYTHON`` another environment's interpreter, ``NULLGPU_DEVICES`` how many GPUs there are (1), ``NULLGPU_LOG=1``
prints which thread sets which device. docs/guides/gpu.md says what this proves and what it cannot.
"""
