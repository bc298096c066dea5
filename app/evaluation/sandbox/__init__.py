"""Run code that a model wrote, away from everything else."""
