"""How calls, bytes, memory and seconds grow with ranks and images: simulated ranks, the engine's own code."""
