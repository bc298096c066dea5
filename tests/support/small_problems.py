"""Small problems of the theory lab, for its tests."""

import numpy as np
import torch

from app.commands.theory.problems import LinearProblem, ReluProblem, normal, second_moment_of


def rng(seed=0):
    return np.random.default_rng(seed)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def linear_and_relu():
    """Return 3 x 50 samples, base weights and changes of 5 x 6, and both problems made of them."""
    inputs = normal(rng(0), 3, 50, 6)
    base, change = normal(rng(1), 3, 5, 6), normal(rng(2), 3, 5, 6)
    linear = LinearProblem(change, second_moment_of(inputs))
    return inputs, base, change, linear, ReluProblem(base, change, inputs)
