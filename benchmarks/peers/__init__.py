"""Other implementations' own training loops, in an environment of their own; nothing of ours is imported."""
