"""Operators of iwm-fast, one public function each. Imports torch, triton and numpy only.

Shape suffixes: N packed tokens of all images, B images, D token width, H hidden width, A action components, Do output
width, M rows of a table of targets, P patch size. Reference implementations are plain PyTorch, work in every floating
dtype up to float64 on every device, and define the correct result of the other backends.
"""

from __future__ import annotations

from ._choices.run_choices import Adopted, RunChoices, read_adopted, run_choices
from ._lib.backend import use_backend, without_autocast
from ._lib.compiled import compiled_variants, triton_functions
from ._mlp.workspace import mlp_workspace, use_workspace
from ._tuning.tuner import TUNED, TUNING_DIR_VARIABLE, bucket, device_name, shipped_attention, tuning_folder, use_tuner
from .conditioned_mlp import (
    conditioned_mlp,
    conditioned_mlp_bytes,
    conditioned_mlp_flops,
    conditioned_mlp_reference,
)
from .e4m3_rows import e4m3_rows, e4m3_rows_bytes, e4m3_rows_flops, e4m3_rows_reference
from .ema_update import ema_update, ema_update_bytes, ema_update_flops, ema_update_reference
from .patchify import patchify, patchify_bytes, patchify_flops, patchify_reference
from .predictor_input import (
    predictor_input,
    predictor_input_bytes,
    predictor_input_flops,
    predictor_input_reference,
)
from .residual_norm import residual_norm, residual_norm_bytes, residual_norm_flops, residual_norm_reference
from .rope import rope, rope_bytes, rope_flops, rope_reference, rotate_qk
from .sigreg import sigreg_sums, sigreg_sums_bytes, sigreg_sums_flops, sigreg_sums_reference
from .stopgrad_l2 import stopgrad_l2, stopgrad_l2_bytes, stopgrad_l2_flops, stopgrad_l2_reference

# Names of the compiled functions in a GPU profile.
TRITON_FUNCTIONS = tuple(sorted(triton_functions()))

__all__ = [
    "TRITON_FUNCTIONS",
    "TUNED",
    "TUNING_DIR_VARIABLE",
    "Adopted",
    "RunChoices",
    "bucket",
    "compiled_variants",
    "conditioned_mlp",
    "conditioned_mlp_bytes",
    "conditioned_mlp_flops",
    "conditioned_mlp_reference",
    "device_name",
    "e4m3_rows",
    "e4m3_rows_bytes",
    "e4m3_rows_flops",
    "e4m3_rows_reference",
    "ema_update",
    "ema_update_bytes",
    "ema_update_flops",
    "ema_update_reference",
    "mlp_workspace",
    "patchify",
    "patchify_bytes",
    "patchify_flops",
    "patchify_reference",
    "predictor_input",
    "predictor_input_bytes",
    "predictor_input_flops",
    "predictor_input_reference",
    "read_adopted",
    "residual_norm",
    "residual_norm_bytes",
    "residual_norm_flops",
    "residual_norm_reference",
    "rope",
    "rope_bytes",
    "rope_flops",
    "rope_reference",
    "rotate_qk",
    "run_choices",
    "shipped_attention",
    "sigreg_sums",
    "sigreg_sums_bytes",
    "sigreg_sums_flops",
    "sigreg_sums_reference",
    "stopgrad_l2",
    "stopgrad_l2_bytes",
    "stopgrad_l2_flops",
    "stopgrad_l2_reference",
    "tuning_folder",
    "use_backend",
    "use_tuner",
    "use_workspace",
    "without_autocast",
]
