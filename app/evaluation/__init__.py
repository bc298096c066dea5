"""Benchmarks: ask a model their questions, keep its answers, compute metrics."""
