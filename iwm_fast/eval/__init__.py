"""What a run is worth: the quality of its world model and of its representation, and the page that shows both.

``report`` and ``charts`` are not imported here: they bring matplotlib, which evaluation while training can do without.
"""

from iwm_fast.eval.evaluate import WHAT, evaluate_model, evaluate_monitor
from iwm_fast.eval.examples import RankedExample, ranked_examples
from iwm_fast.eval.splits import FileSplit, Split, TensorSplit, open_splits

__all__ = [
    "WHAT",
    "FileSplit",
    "RankedExample",
    "Split",
    "TensorSplit",
    "evaluate_model",
    "evaluate_monitor",
    "open_splits",
    "ranked_examples",
]
