"""The methods that the figures compare, and the problems on which they do."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.commands.theory.descent import (
    descend,
    descend_core,
    lora_ga_start,
    random_start,
    spectral_start,
)
from app.commands.theory.instances import frobenius
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
"""Of LoRA-GA's start in the figures, as in the authors' notebook."""


class Method(NamedTuple):
    """A start and a way down."""

    label: str
    spectral: bool
    preconditioned: bool


METHODS = (
    Method("LoRA, gradient descent", False, False),
    Method("LoRA, preconditioned", False, True),
    Method("spectral start, gradient descent", True, False),
    Method("spectral start, preconditioned (LoRA-One)", True, True),
)


def make_problem(
    settings: TheorySettings,
    rng: np.random.Generator,
    kappas: Sequence[float],
    true_rank: int | None = None,
    samples: int | None = None,
) -> Problem:
    """Draw one problem of the configured kind and size for each condition number."""
    given = settings.problem
    values = spaced(true_rank or given.true_rank, torch.tensor(kappas, dtype=torch.float64))
    change = low_rank_change(rng, values, given.outputs, given.inputs)
    samples = samples or given.samples
    if given.kind == "relu":
        return relu_problem(rng, change, samples, given.signal)
    moment = sample_second_moment(rng, len(change), given.inputs, samples)
    return LinearProblem(change, moment)


def updates(
    settings: TheorySettings,
    problem: Problem,
    method: Method,
    rank: int,
    steps: int,
    singular: bool,
) -> Iterator[Tensor]:
    """Yield lora_B @ lora_A (P, m, n) before and after each step of a method.

    Args:
        settings: Step sizes, damping, seed of the random start.
        problem: P problems.
        method: Start and descent.
        rank: r.
        steps: Number of steps.
        singular: Whether the rank is above the true one, so that the spectral start's Gram matrices are
            singular and need the damping that LoRA's start always needs.
    """
    given = settings.descent
    if method.spectral:
        start = spectral_start(problem, rank)
    else:
        rng = np.random.default_rng(settings.problem.seed)
        start = random_start(rng, problem, rank, given.start_variance**0.5)
    damping = given.damping if singular or not method.spectral else 0.0
    lr = given.preconditioned_lr if method.preconditioned else given.lr
    path = descend(problem, start, lr, steps, damping if method.preconditioned else None)
    for lora_A, lora_B in path:
        yield lora_B @ lora_A


def lora_ga_updates(
    settings: TheorySettings, problem: Problem, rank: int, steps: int
) -> Iterator[Tensor]:
    """Yield what LoRA-GA adds to W, preconditioned: lora_B @ lora_A less its value at the start."""
    given = settings.descent
    start = lora_ga_start(problem, rank, LORA_GA_GAMMA)
    offset = -start.lora_B @ start.lora_A
    path = descend(problem, start, given.preconditioned_lr, steps, given.damping, offset)
    for lora_A, lora_B in path:
        yield offset + lora_B @ lora_A


def lora_sb_updates(
    settings: TheorySettings, problem: Problem, rank: int, steps: int
) -> Iterator[Tensor]:
    """Yield what LoRA-SB adds to W."""
    yield from descend_core(problem, rank, settings.descent.preconditioned_lr, steps)


def squared_errors(problem: Problem, path: Iterator[Tensor]) -> Tensor:
    """Return |update - Delta|_F^2, shape (P, steps + 1)."""
    return torch.stack([frobenius(update - problem.change).square() for update in path], 1)


def losses(problem: Problem, path: Iterator[Tensor]) -> Tensor:
    """Return the loss, shape (P, steps + 1)."""
    return torch.stack([problem.loss(update) for update in path], 1)


def steps_until(
    reached: Callable[[Tensor], Tensor], path: Iterator[Tensor], instances: int
) -> Tensor:
    """Return the first step (P,) at which `reached` holds for each instance; NaN where it never does."""
    first = torch.full((instances,), float("nan"), dtype=torch.float64)
    for t, update in enumerate(path):
        first[reached(update) & first.isnan()] = t
        if not bool(first.isnan().any()):
            break
    return first
