"""Measurements against peers and over parameters, each run as `python -m benchmarks.NAME`."""
