"""Work out what a run needs, without loading weights."""
