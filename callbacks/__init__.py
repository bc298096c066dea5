"""Callbacks decide when something happens; `app/` knows what."""
