"""Measurements. Modules, run from the top of the repository: `python -m benchmarks.speed`."""
