"""Gradient initialization: observe the one-step gradient, decompose it, make LoRA factors."""
