"""Run folders, loggers, the run record, plots, and what is logged to W&B."""
