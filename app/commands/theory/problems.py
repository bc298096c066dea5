"""Problems with a known low-rank answer, a linear model and one ReLU layer; distances between subspaces."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.linalg import matrix_norm


@dataclass(frozen=True)
class LinearProblem:
    """y = W_target x, from N samples that matter only through their second moment.

        L(W + update) = 1/(2N) sum_i |(update - Delta) x_i|^2 = 1/2 tr(E Sigma E^T),  E = update - Delta
        dL/dW         = E Sigma,                                           Sigma = 1/N sum_i x_i x_i^T

    Args:
        change: Delta, shape (P, m, n), float64.
        second_moment: Sigma, shape (P, n, n), float64.

    Source: arXiv:2502.01235, eqs. 1-5.
    """

    gamma: ClassVar[float] = 1.0
    """The divisor that makes the spectral initialization estimate Delta: 1 / gamma of the paper."""
    change: Tensor
    second_moment: Tensor

    def loss(self, update: Tensor) -> Tensor:
        """Return the loss (P,) of W + update, an update being (P, m, n)."""
        error = update - self.change
        return ((error @ self.second_moment) * error).sum((-2, -1)) / 2

    def gradient(self, update: Tensor) -> Tensor:
        """Return the gradient (P, m, n) of the loss by the full weight at W + update."""
        return (update - self.change) @ self.second_moment

    def risk(self, update: Tensor) -> Tensor:
        """Return E |y - f(x)|^2 (P,) for a new standard normal x: |E|_F^2 exactly."""
        return (update - self.change).square().sum((-2, -1))


@dataclass(frozen=True)
class ReluProblem:
    """y = relu(W_target x), one layer of m neurons, from N samples.

        L(W + update) = 1/(2N) sum_i |relu((W + update) x_i) - relu(W_target x_i)|^2

    Args:
        base: W, shape (P, m, n), float64.
        change: Delta = W_target - W, shape (P, m, n).
        inputs: The samples, shape (P, N, n).

    Source: arXiv:2502.01235, Sec. 2 and 4.
    """

    gamma: ClassVar[float] = 0.5
    base: Tensor
    change: Tensor
    inputs: Tensor

    @cached_property
    def targets(self) -> Tensor:
        """The answers y_i, shape (P, N, m)."""
        return (self.inputs @ (self.base + self.change).mT).relu_()

    def loss(self, update: Tensor) -> Tensor:
        """Return the mean over the samples of half the squared error."""
        hidden = self.inputs @ (self.base + update).mT
        return (hidden.relu() - self.targets).square().sum((-2, -1)) / (2 * self.inputs.shape[-2])

    def gradient(self, update: Tensor) -> Tensor:
        """Return 1/N sum_i [(f(x_i) - y_i) * relu'((W + update) x_i)] x_i^T."""
        hidden = self.inputs @ (self.base + update).mT
        residual = (hidden - self.targets).mul_(hidden > 0)
        return residual.mT @ self.inputs / self.inputs.shape[-2]

    def expected_gradient(self, update: Tensor) -> Tensor:
        """Return the gradient (P, m, n) for N to infinity.

        A row is 1/2 (w - v) + 1/(2 pi) (phi v - sin(phi) |v| w / |w|), w being that of W + update, v that
        of W_target and phi the angle between them.
        """
        rows, wanted = self.base + update, self.base + self.change
        size, other, phi = _angles(rows, wanted)
        turned = phi * wanted - phi.sin() * other * rows / size
        return (rows - wanted) / 2 + turned / (2 * math.pi)

    def risk(self, update: Tensor) -> Tensor:
        """Return E |y - f(x)|^2 in closed form (the arc-cosine kernel of first order)."""
        size, other, phi = _angles(self.base + update, self.base + self.change)
        # Around phi = 0 the squares cancel; written so that nothing small is a difference of large.
        bend = phi.sin() - phi * phi.cos()
        apart = (update - self.change).square().sum(-1, keepdim=True)
        return (apart / 2 - size * other * bend / math.pi).sum((-2, -1))


Problem = LinearProblem | ReluProblem
"""P independent problems: find `change` (P, m, n), by which the target differs from the base."""


def _angles(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lengths of both and the angle between them, each (P, m, 1), exact for small angles."""
    size, other = (x.norm(dim=-1, keepdim=True) for x in (rows, others))
    one, two = rows / size, others / other
    apart, between = ((one + sign * two).norm(dim=-1, keepdim=True) for sign in (-1, 1))
    return size, other, 2 * torch.atan2(apart, between)


def normal(rng: Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.from_numpy(rng.standard_normal(shape))


def low_rank_change(rng: Generator, singular_values: Tensor, m: int, n: int) -> Tensor:
    """Draw Delta (P, m, n) with the given singular values (P, r) and random singular vectors."""
    instances, rank = singular_values.shape
    left = torch.linalg.qr(normal(rng, instances, m, rank))[0]
    right = torch.linalg.qr(normal(rng, instances, n, rank))[0]
    return left * singular_values[:, None] @ right.mT


def spaced(true_rank: int, kappa: Tensor) -> Tensor:
    """Return singular values (P, true_rank) evenly spaced from 1 down to 1 / kappa, kappa being (P,)."""
    steps = torch.linspace(0, 1, true_rank, dtype=torch.float64)
    return 1 - (1 - 1 / kappa[:, None]) * steps


def sample_second_moment(rng: Generator, instances: int, n: int, samples: int) -> Tensor:
    """Draw Sigma = 1/N sum_i x_i x_i^T (P, n, n) of N standard normal samples without drawing them.

        Sigma = L L^T / N,  L_ii^2 ~ chi^2 with N - i degrees of freedom (i from 0),  L_ij ~ N(0, 1) below

    which is its law (Wishart) for any N >= n, so that theorems can be checked at the N they ask for,
    which may be 10^12.

    Source: Bartlett's decomposition of the Wishart distribution.
    """
    if samples < n:
        raise ValueError(f"samples must be >= n = {n}, got {samples}")
    lower = normal(rng, instances, n, n).tril(-1)
    degrees = samples - np.arange(n)
    diagonal = torch.from_numpy(np.sqrt(rng.chisquare(degrees, (instances, n))))
    lower = lower + torch.diag_embed(diagonal)
    return lower @ lower.mT / samples


def second_moment_of(inputs: Tensor) -> Tensor:
    """Return Sigma (P, n, n) of samples (P, N, n)."""
    return inputs.mT @ inputs / inputs.shape[-2]


def relu_problem(rng: Generator, change: Tensor, samples: int, signal: float) -> ReluProblem:
    """Draw a base weight whose rows are `signal` times as long as the longest row of Delta, and samples.

    Assumption 4.1 wants rows long against Delta's: |Delta_i| / |w_i| = O(1 / (kappa r*)).
    """
    instances, m, n = change.shape
    rows = normal(rng, instances, m, n)
    size = signal * change.norm(dim=-1).amax(-1)[:, None, None]
    base = size * rows / rows.norm(dim=-1, keepdim=True)
    return ReluProblem(base, change, normal(rng, instances, samples, n))


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
    """Linear problems with kappa, the largest singular value of Delta and |Sigma - I|_op, (P,) each."""

    problem: LinearProblem
    kappa: Tensor
    top: Tensor
    deviation: Tensor


def column(values: Tensor) -> Tensor:
    """Shape (P,) as (P, 1, 1), to multiply matrices by."""
    return values[:, None, None]


def log_uniform(rng: Generator, low: float, high: float, count: int) -> Tensor:
    """Draw numbers (count,) whose logarithm is uniform."""
    return torch.from_numpy(np.exp(rng.uniform(math.log(low), math.log(high), count)))


def linear_instances(
    rng: Generator, count: int, shape: Shape, max_kappa: float, closeness: float
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
