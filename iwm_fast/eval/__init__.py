"""What a run is worth: the quality of its world model and of its representation, and the page that shows both.

``report`` and ``charts`` are not imported here: they bring matplotlib, which evaluation while training can do without.
"""

from iwm_fast.eval.evaluate import USUAL, WHAT, evaluate_model
from iwm_fast.eval.online import join_shares, measure_share
from iwm_fast.eval.splits import FileSplit, Split, TensorSplit, open_splits
from iwm_fast.eval.world_model.examples import RankedExample, ranked_examples

__all__ = [
    "USUAL",
    "WHAT",
    "FileSplit",
    "RankedExample",
    "Split",
    "TensorSplit",
    "evaluate_model",
    "join_shares",
    "measure_share",
    "open_splits",
    "ranked_examples",
]
