"""Grids of runs, and reports over runs."""
