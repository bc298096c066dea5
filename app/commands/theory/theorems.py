"""Each theorem of arXiv:2502.01235 as measured <= bound on random instances.

Where the paper hides a constant in O(.) or the text of its appendix is not at hand, the constant here is
ours: the statement of the check says which, and docs/theory.md how it was found.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor
from torch.linalg import matrix_norm, svd, svdvals

from app.commands.theory.descent import descend, random_init, spectral_init
from app.commands.theory.problems import (
    SMALL,
    USUAL,
    Problem,
    Shape,
    aligning_deviation,
    column,
    leading_left,
    linear_instances,
    log_uniform,
    low_rank_change,
    misalignment,
    normal,
    outside,
    relu_problem,
    spaced,
)
from app.initialization.factors import LoraFactors

ROUNDING = 1e-13
"""Where float64 ends, relative to |Delta|: bounds that go to zero go to this."""


@dataclass(frozen=True)
class Check:
    """An inequality on P instances.

    Args:
        name: The theorem.
        statement: What is compared, with our constants.
        measured: Shape (P, ...).
        bound: Same shape, > 0.
        over_steps: Whether the second dimension is steps 1, 2, ... of a descent.
    """

    name: str
    statement: str
    measured: Tensor
    bound: Tensor
    over_steps: bool = False

    @property
    def worst(self) -> float:
        """Return the largest measured / bound; NaN where something measured is."""
        return float((self.measured / self.bound).max())

    @property
    def holds(self) -> bool:
        """Return whether the inequality holds on all instances."""
        return self.worst <= 1


def exact_alignment(
    rng: Generator, count: int, shape: Shape = USUAL, steps: int = 200
) -> list[Check]:
    """Check Theorem 3.1: from a random initialization lora_B's columns lie in G's output space, t >= 1.

    Ranks below, at and above the true one. "Equal" means rounding: m n eps times the condition number of
    lora_B, whose smallest singular vectors are the ones that rounding turns most.
    """
    moments = {1, 2, 3, 5, 10, 20, 50, 100, steps}
    rounding = shape.m * shape.n * torch.finfo(torch.float64).eps
    measured, bound = [], []
    for rank in sorted({max(1, shape.true_rank // 2), shape.true_rank, 2 * shape.true_rank}):
        problem, _, top, _ = linear_instances(rng, count, shape, 4, 1)
        G = problem.gradient(torch.zeros_like(problem.change))
        space = leading_left(G, shape.true_rank)
        scale = log_uniform(rng, 1e-3, 1, count) * (top / shape.n).sqrt()
        lr = log_uniform(rng, 0.02, 0.2, count) / top
        initial = random_init(rng, problem, rank, column(scale))
        k = min(rank, shape.true_rank)
        for t, (_, lora_B) in enumerate(descend(problem, initial, column(lr), steps)):
            if t in moments:
                S = svdvals(lora_B)
                measured.append(misalignment(space, lora_B))
                bound.append(rounding * S[:, 0] / S[:, k - 1])
    statement = "angle of lora_B's space to that of G = 0 for all t >= 1 (rounding: m n eps cond)"
    both = torch.stack(measured, 1), torch.stack(bound, 1)
    return [Check("Thm 3.1, exact alignment", statement, *both)]


def approximate_alignment(
    rng: Generator, count: int, shape: Shape = USUAL, max_kappa: float = 3
) -> list[Check]:
    """Check Theorem 3.2 and Lemma C.6: when lora_A's rows reach the input space of G, rank 2 r*.

        alpha = aligning_deviation(theta)                                       deviation of lora_A's entries
        T     = ln(sqrt(n) / theta) / ln(1 + lr s_r*(G))                        the paper's time
        t*    = ln(2 rho / theta) / ln(1 + lr s_r*(G)),  rho = |A_0 V_perp| / s_min(A_0 V)

    with the paper's unknown constants set to 1 in alpha and T. t* is the time at which the linearised
    descent has the angle theta: there A_t V = A_0 V diag(((1 + lr s_i)^t + (1 - lr s_i)^t) / 2) grows,
    A_t V_perp = A_0 V_perp stays, and the angle is at most |A_t V_perp| / s_min(A_t V). So rho is what the
    paper's sqrt(d) stands for, with the smallest singular value of the random block in it.

    Source: arXiv:2502.01235, Theorem 3.2, Lemmas C.1, C.5, C.6.
    """
    problem, _, top, _ = linear_instances(rng, count, shape, max_kappa, 0.5)
    G = problem.gradient(torch.zeros_like(problem.change))
    _, S, Vh = svd(G, full_matrices=False)
    largest, smallest = S[:, 0], S[:, shape.true_rank - 1]
    space = Vh[:, : shape.true_rank].mT
    theta = log_uniform(rng, 0.03, 0.3, count)
    alpha = aligning_deviation(theta, shape.n, largest, smallest)
    initial = random_init(rng, problem, 2 * shape.true_rank, column(alpha))
    lr = log_uniform(rng, 0.05, 0.3, count) / top
    A_0 = initial.lora_A.mT
    rho = matrix_norm(outside(space, A_0), 2) / svdvals(space.mT @ A_0)[:, -1]
    growth = torch.log1p(lr * smallest)
    paper_time = (math.sqrt(shape.n) / theta).log() / growth
    time = ((2 * rho / theta).log() / growth).ceil()
    angle, remainder = torch.zeros(count).double(), torch.zeros(count).double()
    linear_A, linear_B = initial
    for t, (lora_A, lora_B) in enumerate(descend(problem, initial, column(lr), int(time.max()))):
        arrived = time == t
        if bool(arrived.any()):
            angle[arrived] = misalignment(space[arrived], lora_A[arrived].mT)
        early = paper_time >= t
        if t % 5 == 0 and bool(early.any()):
            rest = torch.cat([(lora_A - linear_A).mT, lora_B - linear_B], 1)[early]
            remainder[early] = torch.maximum(remainder[early], matrix_norm(rest, 2))
        grad_A, grad_B = linear_B.mT @ G, G @ linear_A.mT
        linear_A, linear_B = linear_A - column(lr) * grad_A, linear_B - column(lr) * grad_B
    lemma, theorem = "Lemma C.6, remainder of the linearised descent", "Thm 3.2, alignment in time"
    stays = "|Z_t - H^t Z_0| <= |A_0| for t <= ln(sqrt(n)/theta) / ln(1 + lr s_r*) (constants 1)"
    at = "at t* = ln(2 rho/theta) / ln(1 + lr s_r*)"
    aligns = f"angle of lora_A's space to that of G <= theta {at}"
    return [
        Check(lemma, stays, remainder, matrix_norm(A_0, 2)),
        Check(theorem, aligns, angle, theta),
    ]


def spectral_initialization(
    rng: Generator, count: int, shape: Shape = USUAL, max_kappa: float = 100
) -> list[Check]:
    """Check Theorem 3.3: the error of the spectral initialization, where |Sigma - I| <= 1 / (2 kappa).

    The condition's second half, c / kappa^3, has an unknown c and is left out: less is assumed.
    """
    drawn = linear_instances(rng, count, shape, max_kappa, 0.5)
    lora_A, lora_B = spectral_init(drawn.problem, shape.true_rank)
    error = matrix_norm(lora_B @ lora_A - drawn.problem.change, 2)
    name = "Thm 3.3, spectral initialization"
    bound = drawn.deviation * drawn.top + ROUNDING * drawn.top
    half = "|BA - Delta| <= s_r*(Delta) / 2 where |Sigma - I| <= 1 / (2 kappa)"
    return [
        Check(name, "|BA - Delta| <= |Sigma - I| |Delta|", error, bound),
        Check(name, half, error, drawn.top / drawn.kappa / 2),
    ]


def linear_convergence(
    rng: Generator,
    count: int,
    preconditioned: bool,
    shape: Shape = USUAL,
    max_kappa: float | None = None,
) -> list[Check]:
    """Check the linear rate from the spectral initialization (App. C.2 and C.3) with constants of our own.

        gradient descent   |E_t|_F <= (1 - lr s_r*(Delta) / 2)^t |E_0|_F      lr <= 1 / (4 |Delta|)
        preconditioned     |E_t|_F <= (1 - lr / 2)^t |E_0|_F                  lr <= 1 / 2

    with E = lora_B lora_A - Delta, rank r* and |Sigma - I| <= 1 / (16 kappa), as docs/theory.md derives.
    """
    max_kappa = max_kappa or (1000 if preconditioned else 30)
    problem, kappa, top, _ = linear_instances(rng, count, shape, max_kappa, 1 / 16)
    if preconditioned:
        lr = log_uniform(rng, 0.05, 0.5, count)
        rate, damping, steps = 1 - lr / 2, 0.0, 100
        name, statement = "App. C.3, preconditioned descent", "(1 - lr/2)^t |E_0|, any kappa"
    else:
        lr = log_uniform(rng, 0.025, 0.25, count) / top
        rate, damping, steps = 1 - lr * top / kappa / 2, None, 300
        name, statement = "App. C.2, gradient descent", "(1 - lr s_r*/2)^t |E_0|"
    initial = spectral_init(problem, shape.true_rank)
    measured = _errors(problem, descend(problem, initial, column(lr), steps, damping))
    bound = rate[:, None] ** torch.arange(steps + 1) * measured[:, :1] + ROUNDING * top[:, None]
    statement = f"|BA - Delta|_F <= {statement} where |Sigma - I| <= 1/(16 kappa) (constants ours)"
    # At t = 0 there is nothing to compare.
    return [Check(name, statement, measured[:, 1:], bound[:, 1:], over_steps=True)]


def _errors(problem: Problem, path: Iterator[LoraFactors]) -> Tensor:
    """Return |BA - Delta|_F at each step, shape (P, steps + 1)."""
    return torch.stack([matrix_norm(B @ A - problem.change) for A, B in path], 1)


def relu_convergence(
    rng: Generator, count: int, shape: Shape = SMALL, max_kappa: float = 1.5
) -> list[Check]:
    """Check Theorem 4.2: preconditioned descent of the ReLU layer from the spectral initialization, rank r*.

        |BA - Delta|_F <= (1 - lr/4)^t rho s_r*(Delta),     rho = 1/20, the theorem's largest

    The two conditions have unknown constants: rows of W at least 16 kappa r* times as long as Delta's
    (Assumption 4.1) and N = 256 (n r* kappa)^2 samples (from eps = O(1 / (r* kappa sqrt(n)))). Both were
    chosen so that the inequality holds at t = 0; nothing was chosen for the steps after it.
    """
    m, n, true_rank = shape
    steps = 12
    kappas = log_uniform(rng, 1, max_kappa, count) if true_rank > 1 else torch.ones(count).double()
    tops = log_uniform(rng, 0.1, 10, count)
    rates = rng.uniform(0.2, 1, count)
    measured, bound = [], []
    for kappa, top, lr in zip(kappas, tops, rates, strict=True):
        hard = true_rank * float(kappa)
        change = low_rank_change(rng, top * spaced(true_rank, kappa[None]), m, n)
        problem = relu_problem(rng, change, math.ceil(256 * (n * hard) ** 2), 16 * hard)
        path = descend(problem, spectral_init(problem, true_rank), lr, steps, 0.0)
        measured.append(_errors(problem, path))
        bound.append((1 - lr / 4) ** torch.arange(steps + 1)[None] * top / kappa / 20)
    error, limit = torch.cat(measured), torch.cat(bound)
    name = "Thm 4.2, ReLU, preconditioned"
    first = "|BA - Delta|_F <= s_r*(Delta) / 20 at t = 0 (constants of the conditions ours)"
    later = "|BA - Delta|_F <= (1 - lr/4)^t s_r*(Delta) / 20 at t >= 1"
    return [
        Check(name, first, error[:, 0], limit[:, 0]),
        Check(name, later, error[:, 1:], limit[:, 1:], over_steps=True),
    ]


def relu_risk(rng: Generator, count: int, shape: Shape = USUAL) -> list[Check]:
    """Check Sec. 2: the ReLU layer's risk E |y - f(x)|^2 is at most |BA - Delta|_F^2."""
    m, n, true_rank = shape
    change = low_rank_change(rng, spaced(true_rank, log_uniform(rng, 1, 100, count)), m, n)
    problem = relu_problem(rng, change, 1, 1.0)
    update = change + column(log_uniform(rng, 1e-3, 10, count)) * normal(rng, count, m, n)
    bound = (update - change).square().sum((-2, -1))
    statement = "E |y - f(x)|^2 <= |BA - Delta|_F^2"
    return [Check("Sec. 2, ReLU, risk", statement, problem.risk(update), bound)]


Theorem = Callable[[Generator, int], list[Check]]

THEOREMS: dict[str, dict[str, Theorem]] = {
    "linear": {
        "exact alignment": exact_alignment,
        "approximate alignment": approximate_alignment,
        "spectral initialization": spectral_initialization,
        "gradient descent": lambda rng, count: linear_convergence(rng, count, False),
        "preconditioned descent": lambda rng, count: linear_convergence(rng, count, True),
    },
    "relu": {"preconditioned descent": relu_convergence, "risk": relu_risk},
}
"""What is checked, by the kind of problem."""
