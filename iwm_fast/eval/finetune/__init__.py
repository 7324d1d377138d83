"""Put a trained run to use: heads, the world model, or all of it, fitted to classes or segments."""

from iwm_fast.eval.finetune.modes import MODES
from iwm_fast.eval.finetune.run import Request, finetune_rows, finetune_run, named_folders
from iwm_fast.eval.finetune.saved import Finetuned, load_finetuned

__all__ = ["MODES", "Finetuned", "Request", "finetune_rows", "finetune_run", "load_finetuned", "named_folders"]
