"""Measurements that benchmarks and the profiler share."""
