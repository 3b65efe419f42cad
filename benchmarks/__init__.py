"""Measurements. Each module is a program, run from the root of the repository: `python -m benchmarks.step --help`."""
