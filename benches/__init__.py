"""The benchmark suite: `pytest benches --benchmark-only`."""
