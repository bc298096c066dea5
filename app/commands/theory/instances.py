"""Random instances of a problem, and distances between subspaces."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from app.commands.theory.problems import (
    LinearProblem,
    low_rank_change,
    sample_second_moment,
    spaced,
)


def leading_left(matrix: Tensor, k: int) -> Tensor:
    """Return the k leading left singular vectors (P, m, k) of matrices (P, m, n)."""
    return torch.linalg.svd(matrix, full_matrices=False)[0][..., :k]


def outside(space: Tensor, matrix: Tensor) -> Tensor:
    """Return the part of a matrix (P, m, k) outside of the span of orthonormal columns (P, m, j)."""
    return matrix - space @ (space.mT @ matrix)


def misalignment(space: Tensor, matrix: Tensor) -> Tensor:
    """Return the sine of the largest angle (P,) from a matrix's leading left space to a space.

        |U_perp(space)^T U_k(matrix)|_op,     k = min(columns of space, columns of matrix)

    Args:
        space: Orthonormal columns, shape (P, m, j).
        matrix: Shape (P, m, r): lora_B for the output side, lora_A^T for the input side.

    Source: arXiv:2502.01235, eqs. 6-7. Small angles keep their digits: nothing is subtracted from 1.
    """
    k = min(space.shape[-1], matrix.shape[-1])
    return matrix_norm(outside(space, leading_left(matrix, k)), 2)


def aligning_deviation(theta: Tensor | float, n: int, largest: Tensor, smallest: Tensor) -> Tensor:
    """Return the deviation (P,) of lora_A's entries from which Theorem 3.2 has lora_A align.

        alpha = theta^(3 kappa_G / 2) n^(-3 kappa_G / 4 - 1 / 2) |G|^(1/2),     the unknown constant being 1

    Args:
        theta: Sine of the angle to reach.
        n: Input length.
        largest: s_1(G), shape (P,).
        smallest: s_r*(G), shape (P,); kappa_G = s_1 / s_r*.
    """
    alpha = theta ** (1.5 * largest / smallest) * largest.sqrt()
    return alpha * n ** (-0.75 * largest / smallest - 0.5)


class Shape(NamedTuple):
    """W is m x n and Delta has rank true_rank."""

    m: int
    n: int
    true_rank: int


USUAL = Shape(16, 24, 4)
SMALL = Shape(4, 6, 2)
"""Where samples are drawn one by one, and many are needed."""


class Instances(NamedTuple):
    """Linear problems with what the bounds are made of, (P,) each."""

    problem: LinearProblem
    kappa: Tensor
    top: Tensor
    """Largest singular value of Delta."""
    deviation: Tensor
    """|Sigma - I|_op."""


def column(values: Tensor) -> Tensor:
    """Shape (P,) as (P, 1, 1), to multiply matrices by."""
    return values[:, None, None]


def log_uniform(rng: np.random.Generator, low: float, high: float, count: int) -> Tensor:
    """Draw numbers (count,) whose logarithm is uniform."""
    return torch.from_numpy(np.exp(rng.uniform(math.log(low), math.log(high), count)))


def linear_instances(
    rng: np.random.Generator, count: int, shape: Shape, max_kappa: float, closeness: float
) -> Instances:
    """Draw linear problems with |Sigma - I|_op <= closeness / kappa; what exceeds it is drawn again.

    |Delta| is between 0.1 and 10 and kappa between 1 and `max_kappa`, both log-uniform. The number of
    samples is n (3 kappa / closeness)^2: the deviation is about 2 sqrt(n / N).
    """
    m, n, true_rank = shape
    kappa = log_uniform(rng, 1, max_kappa, count) if true_rank > 1 else torch.ones(count).double()
    top = log_uniform(rng, 0.1, 10, count)
    change = low_rank_change(rng, top[:, None] * spaced(true_rank, kappa), m, n)
    moments = []
    for value in kappa.tolist():
        samples = math.ceil(n * (3 * value / closeness) ** 2)
        moment = sample_second_moment(rng, 1, n, samples)
        while float(deviation(moment)) > closeness / value:
            moment = sample_second_moment(rng, 1, n, samples)
        moments.append(moment)
    problem = LinearProblem(change, torch.cat(moments))
    return Instances(problem, kappa, top, deviation(problem.second_moment))


def deviation(second_moment: Tensor) -> Tensor:
    """Return |Sigma - I|_op (P,)."""
    return matrix_norm(second_moment - torch.eye(second_moment.shape[-1], dtype=torch.float64), 2)
