"""Simulated ranks that run the engine's own control plane, for `benchmarks.scale` and tests."""
