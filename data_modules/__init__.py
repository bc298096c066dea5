"""One file a data source: where it comes from, its prompt, its labels."""
