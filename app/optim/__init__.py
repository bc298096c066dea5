"""Optimizers of LoRA pairs."""
