"""What benchmarks and the profiler share."""
