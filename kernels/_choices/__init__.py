"""Block sizes that all ranks of a run share: timed if missing, agreed on, and the same after a resume."""
