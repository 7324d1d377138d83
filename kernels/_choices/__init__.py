"""Block sizes that all ranks of a run use: timed where they are missing, agreed on, and the same after a resume."""
