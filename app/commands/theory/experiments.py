"""Figures of both models: convergence over condition numbers and ranks, the spectral initialization's error."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from numpy.random import default_rng
from torch.linalg import matrix_norm, svdvals

from app.commands.theory.descent import (
    METHODS,
    along,
    descend,
    descend_core,
    first_step,
    lora_ga_updates,
    make_problem,
    random_init,
    spectral_init,
    squared_errors,
    updates,
)
from app.commands.theory.figures import Axis, Curve, Picture
from app.commands.theory.problems import LinearProblem, Problem, ReluProblem, deviation
from app.commands.theory.settings import TheorySettings
from app.commands.theory.theorems import Check
from app.initialization.factors import LoraFactors

STEP = "gradient descent step t"
FLOOR = 1e-30
"""Values below it are rounding, and not drawn."""
TOLERANCE = 1e-4
"""|BA - Delta|_F at which a descent has arrived; |Delta|_op is 1."""
GAMMAS = tuple(0.5 + 0.25 * i for i in range(11))
"""The paper's gamma, from 0.5 to 3; ours is its inverse."""
DAMPINGS = tuple(10.0**power for power in range(-4, 2))
ENDS = (DAMPINGS[0], DAMPINGS[-1])
NEGLIGIBLE = 1e-30
"""The damping beside a relative one: only a Gram matrix of zero has no more."""
MOST_STEPS = 200
"""Of preconditioned descents over the damping."""


def loss_by_kappa(settings: TheorySettings) -> list[Picture]:
    """Draw loss against steps of each method, one panel for a condition number."""
    kappas = settings.sweep.kappas
    rank, steps = settings.problem.true_rank, settings.descent.steps
    problem = make_problem(settings, kappas)
    curves = []
    for method in METHODS:
        rows = along(updates(settings, problem, method, rank, steps), problem.loss)
        for kappa, row in zip(kappas, rows, strict=True):
            curves.append(Curve(f"kappa = {kappa:g}", method.label, range(steps + 1), row))
    title = f"Loss at rank r = r* = {rank}, {settings.problem.kind} model"
    return [Picture("loss_by_kappa", title, Axis(STEP), Axis("loss L", "log", FLOOR), curves)]


def error_by_rank(settings: TheorySettings) -> list[Picture]:
    """Draw the error against steps at ranks below, at and above the true one, with the methods of Fig. 4.

    The second panel has a light tail: r = 3 r* of a true rank 4 r*, whose last singular values are small.
    """
    low, kappa, steps = settings.problem.true_rank, settings.problem.kappa, settings.descent.steps
    panels = [(max(1, low // 2), low, kappa), (3 * low, 4 * low, 4.0 * low)]
    panels += [(low, low, kappa), (2 * low, low, kappa)]
    curves = []
    for rank, true_rank, kappa in panels:
        problem = make_problem(settings, [kappa], true_rank)
        panel = f"r = {rank}, r* = {true_rank}"
        paths = {
            method.label: updates(settings, problem, method, rank, steps, rank > true_rank)
            for method in METHODS
        }
        paths["LoRA-GA, preconditioned"] = lora_ga_updates(settings, problem, rank, steps)
        lr = settings.descent.preconditioned_lr
        paths["LoRA-SB, gradient descent"] = descend_core(problem, rank, lr, steps)
        for label, path in paths.items():
            [row] = squared_errors(problem, path)
            curves.append(Curve(panel, label, range(steps + 1), row))
        if rank < true_rank:
            best = float(svdvals(problem.change[0])[rank:true_rank].square().sum())
            curves.append(Curve(panel, "best rank-r matrix", [0, steps], [best, best], "bound"))
    title = f"Error at ranks below, at and above the true one, {settings.problem.kind} model"
    y = Axis("error |BA - Delta|_F^2", "log", FLOOR)
    return [Picture("error_by_rank", title, Axis(STEP), y, curves, share_y=False)]


def steps_by_kappa(settings: TheorySettings) -> list[Picture]:
    """Draw the steps to a fixed error against the condition number, with and without preconditioner."""
    kappas, rank = settings.sweep.many_kappas, settings.problem.true_rank
    problem = make_problem(settings, kappas)
    most = math.ceil(20 * max(5, *kappas) / settings.descent.lr)

    def reached(update: torch.Tensor) -> torch.Tensor:
        return matrix_norm(update - problem.change) <= TOLERANCE

    curves, panel = [], f"r = r* = {rank}"
    for method in METHODS:
        path = updates(settings, problem, method, rank, most)
        curves.append(Curve(panel, method.label, kappas, first_step(path, reached, len(kappas))))
    one = curves[2].y[0]
    line = [one * kappa / kappas[0] for kappa in kappas]
    curves.append(Curve(panel, "proportional to kappa", kappas, line, "bound"))
    title = f"Steps to |BA - Delta|_F = {TOLERANCE:g} |Delta|, {settings.problem.kind} model"
    x = Axis("condition number kappa of Delta", "log")
    return [Picture("steps_by_kappa", title, x, Axis("steps", "log"), curves)]


def steps_by_damping(settings: TheorySettings) -> list[Picture]:
    """Draw the steps to a fixed error over the damping, absolute and in units of the Gram matrices.

    Of the linear model, at the true rank, above it, and above it in other units, those of a Delta of a
    hundredth: variance of LoRA's random lora_A and step size of gradient descent are in them too.
    """
    given, low, kappa = settings.descent, settings.problem.true_rank, max(settings.sweep.kappas)
    problem = make_problem(settings, [kappa])
    assert isinstance(problem, LinearProblem)
    curves = []
    for rank, size in ((low, 1.0), (2 * low, 1.0), (2 * low, 0.01)):
        sized = replace(problem, change=size * problem.change)
        panel = f"r = {rank}, r* = {low}, |Delta|_op = {size:g}"
        rng = default_rng(settings.problem.seed)
        initials = {
            "LoRA": random_init(rng, sized, rank, (size * given.init_variance) ** 0.5),
            "spectral initialization": spectral_init(sized, rank),
        }
        for name, initial in initials.items():
            steps = partial(_steps, sized, size * TOLERANCE, initial)
            lr = given.preconditioned_lr
            absolute = [steps(lr, MOST_STEPS, damping) for damping in DAMPINGS]
            relative = [steps(lr, MOST_STEPS, NEGLIGIBLE, damping) for damping in DAMPINGS]
            plain = steps(given.lr / size, 5 * MOST_STEPS, None)  # it has the units of 1 / Delta
            curves += [
                Curve(panel, f"{name}, damping", DAMPINGS, absolute),
                Curve(panel, f"{name}, relative damping", DAMPINGS, relative),
                Curve(panel, f"{name}, gradient descent", ENDS, [plain, plain], "bound"),
            ]
    title = f"Steps to |BA - Delta|_F = {TOLERANCE:g} |Delta|, linear model, kappa = {kappa:g}"
    x = Axis("damping, or relative damping", "log")
    return [Picture("steps_by_damping", title, x, Axis("steps", "log"), curves)]


def _steps(
    problem: Problem,
    tolerance: float,
    initial: LoraFactors,
    lr: float,
    most: int,
    damping: float | None,
    relative_damping: float = 0.0,
) -> float:
    """Return the first of at most so many steps at which the error is small enough; NaN if none is."""
    path = descend(problem, initial, lr, most, damping, relative_damping=relative_damping)
    updates_of = (lora_B @ lora_A for lora_A, lora_B in path)
    [first] = first_step(updates_of, lambda u: matrix_norm(u - problem.change) <= tolerance, 1)
    return first


def spectral_error(settings: TheorySettings) -> list[Picture]:
    """Draw the spectral initialization's error against the number of samples, with its bound."""
    given, xs = settings.problem, settings.sweep.samples_per_input
    kappas = [given.kappa] * settings.sweep.draws
    problems = [make_problem(settings, kappas, samples=many * given.inputs) for many in xs]
    change, last = problems[0].change, problems[-1]  # Delta is the same for all numbers of samples
    curves = []
    for rank in (max(1, given.true_rank // 2), given.true_rank, 2 * given.true_rank):
        panel = f"r = {rank}, r* = {given.true_rank}"
        errors = []
        for problem in problems:
            lora_A, lora_B = spectral_init(problem, rank)
            errors.append(float(matrix_norm(lora_B @ lora_A - problem.change, 2).mean()))
        label = f"spectral initialization, mean of {settings.sweep.draws}"
        curves.append(Curve(panel, label, xs, errors))
        if rank < given.true_rank:
            left = float(svdvals(change[0])[rank])
            curves.append(Curve(panel, "best rank-r matrix", xs, [left] * len(xs), "bound"))
        elif isinstance(last, ReluProblem):
            G = last.expected_gradient(torch.zeros_like(change)) / last.gamma
            row = [float(matrix_norm(-G - change, 2).mean())] * len(xs)
            curves.append(Curve(panel, "error for N to infinity, any rank", xs, row, "bound"))
        else:
            linear = [problem for problem in problems if isinstance(problem, LinearProblem)]
            row = [float(deviation(problem.second_moment).mean()) for problem in linear]
            curves.append(Curve(panel, "bound |Sigma - I|_op (Thm 3.3)", xs, row, "bound"))
    title = f"Error of the spectral initialization, {given.kind} model"
    y = Axis("|BA - Delta|_op / |Delta|_op", "log")
    return [Picture("spectral_error", title, Axis("samples per input N / n", "log"), y, curves)]


def error_by_gamma(settings: TheorySettings) -> list[Picture]:
    """Draw the spectral initialization's error over gamma: the theory says 2, as E[dL/dW] ~ -Delta / 2."""
    given, rank = settings.problem, settings.problem.true_rank
    kappas, curves = [given.kappa] * settings.sweep.draws, []
    panel = f"r = r* = {rank}, kappa = {given.kappa:g}"
    for many in settings.sweep.samples_per_input:
        problem = make_problem(settings, kappas, samples=many * given.inputs)
        lora_A, lora_B = spectral_init(problem, rank, gamma=1.0)
        size = matrix_norm(problem.change)
        row = [
            float((matrix_norm(gamma * lora_B @ lora_A - problem.change) / size).mean())
            for gamma in GAMMAS
        ]
        curves.append(Curve(panel, f"N = {many} n", GAMMAS, row))
    errors = torch.tensor([curve.y for curve in curves])
    ends = [float(errors.min()), float(errors.max())]
    curves.append(Curve(panel, "gamma = 2", [2, 2], ends, "bound"))
    title = "Error of the spectral initialization over gamma, relu model"
    x, y = Axis("gamma (the paper's; ours is 1 / gamma)"), Axis("|BA - Delta|_F / |Delta|_F", "log")
    return [Picture("error_by_gamma", title, x, y, curves)]


def convergence_bounds(checks: Sequence[Check]) -> list[Picture]:
    """Draw measured / bound against steps of the theorems of convergence, over their instances."""
    curves = []
    for check in checks:
        ratio = check.measured / check.bound
        steps = range(1, 1 + ratio.shape[1])
        for label, row in (("largest", ratio.amax(0)), ("median", ratio.median(0).values)):
            label = f"{label} of {len(check.measured)} instances"
            curves.append(Curve(check.name, label, steps, row.tolist()))
        curves.append(Curve(check.name, "the bound", [0, steps[-1]], [1, 1], "bound"))
    y = Axis("|BA - Delta|_F / its bound", "log", 1e-6)
    return [Picture("convergence_bounds", "Convergence against its bound", Axis(STEP), y, curves)]
