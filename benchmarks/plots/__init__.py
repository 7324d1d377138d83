"""Pictures of what the benchmarks measured."""
