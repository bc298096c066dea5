"""Score one step of the base weights, W - eta G, and no training."""
