"""The method: gradient observation, spectral initialisation, optimizers, and the model around them."""
