"""Initializations and descents of LoRA factors, the methods made of them, and the problems of the figures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.linalg import matrix_norm

from app.commands.theory.problems import (
    LinearProblem,
    Problem,
    low_rank_change,
    normal,
    relu_problem,
    sample_second_moment,
    spaced,
)
from app.commands.theory.settings import TheorySettings
from app.initialization.factors import (
    SVD,
    LoraFactors,
    lora_ga_factors,
    spectral_factors,
    truncated_svd,
)
from app.optim.preconditioner import Cache, precondition_pairs

State = TypeVar("State")

LORA_GA_GAMMA = 4.0
"""Of LoRA-GA's initialization in the figures, as in the authors' notebook."""


def random_init(rng: Generator, problem: Problem, rank: int, scale: Tensor | float) -> LoraFactors:
    """Return LoRA's: lora_A normal with deviation `scale` (a number or (P, 1, 1)), lora_B zero."""
    instances, m, n = problem.change.shape
    lora_A = scale * normal(rng, instances, rank, n)
    return LoraFactors(lora_A, lora_A.new_zeros(instances, m, rank))


def gradient_svds(problem: Problem, rank: int) -> list[SVD]:
    """Return each instance's leading triplets of the one-step gradient dL/dW at W."""
    return [truncated_svd(G, rank) for G in problem.gradient(torch.zeros_like(problem.change))]


def spectral_init(problem: Problem, rank: int, gamma: float | None = None) -> LoraFactors:
    """Return that of the paper's theorems: lora_B @ lora_A = P_r(-dL/dW) / gamma, balanced.

    Without a gamma it is the one that the theory gives for this model.

    Source: arXiv:2502.01235, eq. 8, whose gamma is 1 / gamma here.
    """
    divisor = problem.gamma if gamma is None else gamma
    svds = gradient_svds(problem, rank)
    return _stacked(spectral_factors(svd, divisor, unit=1.0) for svd in svds)


def _stacked(factors: Iterable[tuple[Tensor, Tensor]]) -> LoraFactors:
    return LoraFactors(*(torch.stack(same) for same in zip(*factors, strict=True)))


def descend(
    problem: Problem,
    initial: LoraFactors,
    lr: Tensor | float,
    steps: int,
    damping: float | None = None,
    offset: Tensor | float = 0.0,
    relative_damping: float = 0.0,
) -> Iterator[LoraFactors]:
    """Yield the factors before the first and after each step of full-batch gradient descent.

        G       = dL/dW at W + offset + lora_B @ lora_A
        lora_A <- lora_A - lr * P_A(lora_B^T G)          P_A(g) = (lora_B^T lora_B + lambda I)^-1 g
        lora_B <- lora_B - lr * P_B(G lora_A^T)          P_B(g) = g (lora_A lora_A^T + lambda I)^-1

    both from the old factors; without a damping P_A and P_B are the identity.

    Args:
        problem: P problems.
        initial: lora_A (P, r, n) and lora_B (P, m, r).
        lr: A number, or one for each instance (P, 1, 1).
        steps: Number of steps.
        damping: Of the preconditioner; 0 is the paper's; None leaves the preconditioner out.
        offset: What is added to W beside the product (P, m, n).
        relative_damping: Multiple of a Gram matrix's mean eigenvalue that lambda has beside damping.

    Raises:
        RuntimeError: The damping is 0 and a Gram matrix is singular.

    Source: arXiv:2502.01235, eqs. 3 and 9.
    """
    lora_A, lora_B = initial
    cache: Cache = {}
    yield initial
    for _ in range(steps):
        G = problem.gradient(offset + lora_B @ lora_A)
        grad_A, grad_B = lora_B.mT @ G, G @ lora_A.mT
        if damping is not None:
            factors = (lora_A.unbind(), lora_B.unbind())
            gradients = (grad_A.unbind(), grad_B.unbind())
            ready = precondition_pairs(
                *factors, *gradients, damping, cache, relative_damping=relative_damping
            )
            grad_A, grad_B = (torch.stack([g for g in side if g is not None]) for side in ready)
        lora_A, lora_B = lora_A - lr * grad_A, lora_B - lr * grad_B
        yield LoraFactors(lora_A, lora_B)


def descend_core(problem: Problem, rank: int, lr: float, steps: int) -> Iterator[Tensor]:
    """Yield the update U R V^T before and after each step, R alone being trained (LoRA-SB).

    U and V are the leading singular vectors of the one-step gradient and R is diag(-S) at first.

    Source: arXiv:2411.19557, by plain gradient descent.
    """
    svds = gradient_svds(problem, rank)
    left, right = torch.stack([s.U for s in svds]), torch.stack([s.V for s in svds])
    core = torch.diag_embed(-torch.stack([s.S for s in svds]))
    for _ in range(steps + 1):
        update = left @ core @ right.mT
        yield update
        core = core - lr * left.mT @ problem.gradient(update) @ right


def first_step(
    path: Iterable[State], reached: Callable[[State], Tensor], instances: int
) -> list[float]:
    """Return the first step at which `reached` (P,) holds, for each instance; NaN where it never does."""
    first = torch.full((instances,), float("nan"), dtype=torch.float64)
    for t, state in enumerate(path):
        first[reached(state) & first.isnan()] = t
        if not bool(first.isnan().any()):
            break
    return first.tolist()


class Method(NamedTuple):
    """A curve of the figures: an initialization and a kind of descent."""

    label: str
    spectral: bool
    preconditioned: bool


METHODS = (
    Method("LoRA, gradient descent", False, False),
    Method("LoRA, preconditioned", False, True),
    Method("spectral initialization, gradient descent", True, False),
    Method("spectral initialization, preconditioned (LoRA-One)", True, True),
)


def make_problem(
    settings: TheorySettings,
    kappas: Sequence[float],
    true_rank: int | None = None,
    samples: int | None = None,
    rng: Generator | None = None,
) -> Problem:
    """Draw one problem of the configured kind, size and seed for each condition number."""
    given = settings.problem
    rng = rng or default_rng(given.seed)
    values = spaced(true_rank or given.true_rank, torch.tensor(kappas, dtype=torch.float64))
    change = low_rank_change(rng, values, given.outputs, given.inputs)
    samples = samples or given.samples
    if given.kind == "relu":
        return relu_problem(rng, change, samples, given.signal)
    return LinearProblem(change, sample_second_moment(rng, len(change), given.inputs, samples))


def updates(
    settings: TheorySettings,
    problem: Problem,
    method: Method,
    rank: int,
    steps: int,
    singular: bool = False,
) -> Iterator[Tensor]:
    """Yield lora_B @ lora_A (P, m, n) before and after each step of a method.

    With `singular` the rank is above the true one, so that the Gram matrices of the spectral initialization
    are singular and need the damping that LoRA's always needs.
    """
    given = settings.descent
    if method.spectral:
        initial = spectral_init(problem, rank)
    else:
        rng = default_rng(settings.problem.seed)
        initial = random_init(rng, problem, rank, given.init_variance**0.5)
    damping = given.damping if singular or not method.spectral else 0.0
    lr = given.preconditioned_lr if method.preconditioned else given.lr
    path = descend(problem, initial, lr, steps, damping if method.preconditioned else None)
    return (lora_B @ lora_A for lora_A, lora_B in path)


def lora_ga_updates(
    settings: TheorySettings, problem: Problem, rank: int, steps: int
) -> Iterator[Tensor]:
    """Yield what LoRA-GA adds to W, preconditioned: lora_B @ lora_A less its initial value.

    Triplets 1..r of the gradient go into lora_A, the next r into lora_B, with size m^(1/4) / sqrt(gamma).

    Source: arXiv:2407.05000 with the authors' direction ArB2r and scale "stable".
    """
    given, svds = settings.descent, gradient_svds(problem, 2 * rank)
    initial = _stacked(lora_ga_factors(svd, rank, LORA_GA_GAMMA) for svd in svds)
    offset = -initial.lora_B @ initial.lora_A
    path = descend(problem, initial, given.preconditioned_lr, steps, given.damping, offset)
    return (offset + lora_B @ lora_A for lora_A, lora_B in path)


def along(path: Iterator[Tensor], value: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """Return a value (P,) of each update of a path, as a row of steps + 1 numbers for each instance."""
    return torch.stack([value(update) for update in path], 1).tolist()


def squared_errors(problem: Problem, path: Iterator[Tensor]) -> list[list[float]]:
    """Return |update - Delta|_F^2 along a path."""
    return along(path, lambda update: matrix_norm(update - problem.change).square())
