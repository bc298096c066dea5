"""Callbacks: when something happens in a run; what happens is in `app/`."""
