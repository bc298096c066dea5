"""Run folders, loggers, summary.json, plots and what W&B is told."""
