"""The long load: `python -m benchmarks.soak`."""
