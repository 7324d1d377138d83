"""Finetuning of a run: heads, the world model, or all of it, fitted to classes or segments.

``run`` is not imported here: it imports the loading of checkpoints, which fitting does not need.
"""

from iwm_fast.eval.finetune.finetuned_model import Classified, FinetunedModel
from iwm_fast.eval.finetune.fitting import Fit, Plan, fit, measure
from iwm_fast.eval.finetune.modes import MODES
from iwm_fast.eval.finetune.saved import Finetuned, load_finetuned
from iwm_fast.eval.finetune.tasks import Task

__all__ = [
    "MODES",
    "Classified",
    "Finetuned",
    "FinetunedModel",
    "Fit",
    "Plan",
    "Task",
    "fit",
    "load_finetuned",
    "measure",
]
