"""Cost of a run before its launch: memory, time, FLOPs, communication."""
