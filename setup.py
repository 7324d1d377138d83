"""Installs iwm-fast. Metadata and the mapping of folders stand here; the tools' settings stand in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """``iwm_fast.__version__``, read without importing the package (its requirements are not there yet)."""
    tree = ast.parse((ROOT / "iwm_fast" / "version.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets
        ):
            return str(ast.literal_eval(node.value))
    raise RuntimeError("iwm_fast/version.py does not set __version__")


# The checkout has relative links iwm_fast/{kernels,configs,benchmarks}, so that it also runs without being installed.
# The links are left out here and the folders they lead to are mapped instead: each file enters the wheel once.
MAPPED = ("kernels", "configs", "benchmarks")
ENGINE = find_packages(include=["iwm_fast", "iwm_fast.*"], exclude=[f"iwm_fast.{name}*" for name in MAPPED])
BELOW = [f"iwm_fast.{name}.{below}" for name in MAPPED for below in find_packages(name)]

setup(
    name="iwm-fast",
    version=version(),
    description="A fast training engine for Image World Models: a JEPA whose predictor is told the transformation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*ENGINE, *(f"iwm_fast.{name}" for name in MAPPED), *BELOW],
    package_dir={f"iwm_fast.{name}": name for name in MAPPED},
    package_data={
        "iwm_fast": ["py.typed"],
        "iwm_fast.eval.report": ["templates/*.html", "templates/*.css", "templates/*.js"],
        "iwm_fast.export": ["templates/README.md"],
        "iwm_fast.kernels": ["tuned.json"],
        "iwm_fast.configs": ["*.yaml", "ablations/*.yaml", "deepspeed/*.json", "slurm/*.sbatch"],
    },
    include_package_data=False,
    entry_points={"console_scripts": ["iwm-fast = iwm_fast.cli.main:main"]},
    # The bounds are the versions that were run together. torch 2.14 and later would bring CUDA packages of several GB
    # to machines without a GPU; the CPU build of torch asks for no triton, so triton has a bound of its own.
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8",
        "xformers>=0.0.35,<0.0.36",
        "deepspeed>=0.19.8,<0.20",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "nvidia-nvimgcodec-cu13>=0.9,<0.10",  # DALI's decoders: its releases differ in what crashes on which GPU
        "numpy>=2.0,<3",
        "pillow>=11",
        "pydantic>=2.10,<3",
        "PyYAML>=6.0.2",
        "typer>=0.15",
        "rich>=13.8",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
        "jinja2>=3.1,<4",
        "packaging>=24",
        "google-crc32c>=1.5,<2",
        "protobuf>=5,<8",
    ],
    extras_require={
        # setuptools and wheel: a test builds the wheel and looks into it.
        "test": [
            "pytest>=8.3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.115",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML>=6.0.12",
            "scikit-learn>=1.5",
            "onnx>=1.17,<2",
            "onnxscript>=0.5,<0.8",
            "onnxruntime>=1.20,<2",
            # torchvision is timm's requirement; each release of it belongs to one of torch, so this bound is torch's.
            "timm>=1.0.9,<2",
            "torchvision>=0.26,<0.29",
            "transformers>=5.24,<6",
            "setuptools>=77",
            "wheel>=0.43",
            "prometheus_client>=0.20,<1",
            "boto3>=1.36,<2",
            "moto[server]>=5,<6",
            "pyarrow>=18",
            "gymnasium>=1.1,<2",
            "pygame>=2.6",
        ],
        "s3": ["boto3>=1.36,<2"],
        "wandb": ["wandb>=0.25,<1"],
        "prometheus": ["prometheus_client>=0.20,<1"],
        "onnx": ["onnx>=1.17,<2", "onnxscript>=0.5,<0.8", "onnxruntime>=1.20,<2"],
        # The names of weights, and what its save_pretrained writes, differ between releases 4 and 5.
        "hf": ["transformers>=5.24,<6"],
        # timm is one of the peers that benchmarks/peers.py compares with.
        "bench": ["psutil>=6", "timm>=1.0.9,<2"],
        "games": ["gymnasium>=1.1,<2", "pygame>=2.6"],
        "parquet": ["pyarrow>=18"],
        # The site of docs/: mkdocs build --strict.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
