"""What the project's own benchmarks measure: `python -m jobs.benchmark suite=NAME`."""
