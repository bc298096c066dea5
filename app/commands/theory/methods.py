"""The methods that the figures compare, and the problems on which they do."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from app.commands.theory.descent import descend, lora_ga_init, random_init, spectral_init
from app.commands.theory.problems import (
    LinearProblem,
    Problem,
    low_rank_change,
    relu_problem,
    sample_second_moment,
    spaced,
)
from app.commands.theory.settings import TheorySettings

LORA_GA_GAMMA = 4.0
"""Of LoRA-GA's initialization in the figures, as in the authors' notebook."""


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
    rng: np.random.Generator | None = None,
) -> Problem:
    """Draw one problem of the configured kind, size and seed for each condition number."""
    given = settings.problem
    rng = rng or np.random.default_rng(given.seed)
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

    Args:
        settings: Step sizes, damping, seed of LoRA's random initialization.
        problem: P problems.
        method: Initialization and descent.
        rank: r.
        steps: Number of steps.
        singular: Whether the rank is above the true one, so that the Gram matrices of the spectral
            initialization are singular and need the damping that LoRA's always needs.
    """
    given = settings.descent
    if method.spectral:
        initial = spectral_init(problem, rank)
    else:
        rng = np.random.default_rng(settings.problem.seed)
        initial = random_init(rng, problem, rank, given.init_variance**0.5)
    damping = given.damping if singular or not method.spectral else 0.0
    lr = given.preconditioned_lr if method.preconditioned else given.lr
    path = descend(problem, initial, lr, steps, damping if method.preconditioned else None)
    return (lora_B @ lora_A for lora_A, lora_B in path)


def lora_ga_updates(
    settings: TheorySettings, problem: Problem, rank: int, steps: int
) -> Iterator[Tensor]:
    """Yield what LoRA-GA adds to W, preconditioned: lora_B @ lora_A less its initial value."""
    given = settings.descent
    initial = lora_ga_init(problem, rank, LORA_GA_GAMMA)
    offset = -initial.lora_B @ initial.lora_A
    path = descend(problem, initial, given.preconditioned_lr, steps, given.damping, offset)
    return (offset + lora_B @ lora_A for lora_A, lora_B in path)


def along(path: Iterator[Tensor], value: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """Return a value (P,) of each update of a path, as a row of steps + 1 numbers for each instance."""
    return torch.stack([value(update) for update in path], 1).tolist()


def squared_errors(problem: Problem, path: Iterator[Tensor]) -> list[list[float]]:
    """Return |update - Delta|_F^2 along a path."""
    return along(path, lambda update: matrix_norm(update - problem.change).square())
