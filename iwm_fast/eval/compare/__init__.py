"""Compare runs: the differences of their configurations, their curves, and which differences exceed noise."""
