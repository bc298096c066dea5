"""Figures of both models: convergence over condition numbers and ranks, the spectral start's error."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from app.commands.theory.descent import spectral_start
from app.commands.theory.figures import Axis, Curve, Picture
from app.commands.theory.instances import frobenius, spectral_norm
from app.commands.theory.methods import (
    METHODS,
    lora_ga_updates,
    lora_sb_updates,
    losses,
    make_problem,
    squared_errors,
    steps_until,
    updates,
)
from app.commands.theory.problems import LinearProblem, ReluProblem
from app.commands.theory.settings import TheorySettings
from app.commands.theory.theorems import Check

STEP = "gradient descent step t"
FLOOR = 1e-30
"""Values below it are rounding, and not drawn."""
TOLERANCE = 1e-4
"""|BA - Delta|_F at which a descent has arrived; |Delta|_op is 1."""


def loss_by_kappa(settings: TheorySettings) -> list[Picture]:
    """Draw loss against steps of each method, one panel for a condition number."""
    kappas = settings.sweep.kappas
    rank, steps = settings.problem.true_rank, settings.descent.steps
    problem = make_problem(settings, np.random.default_rng(settings.problem.seed), kappas)
    curves = []
    for method in METHODS:
        values = losses(problem, updates(settings, problem, method, rank, steps, singular=False))
        for kappa, row in zip(kappas, values.tolist(), strict=True):
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
        rng = np.random.default_rng(settings.problem.seed)
        problem = make_problem(settings, rng, [kappa], true_rank)
        panel = f"r = {rank}, r* = {true_rank}"
        for method in METHODS:
            path = updates(settings, problem, method, rank, steps, singular=rank > true_rank)
            [row] = squared_errors(problem, path).tolist()
            curves.append(Curve(panel, method.label, range(steps + 1), row))
        for label, path in (
            ("LoRA-GA, preconditioned", lora_ga_updates(settings, problem, rank, steps)),
            ("LoRA-SB, gradient descent", lora_sb_updates(settings, problem, rank, steps)),
        ):
            [row] = squared_errors(problem, path).tolist()
            curves.append(Curve(panel, label, range(steps + 1), row))
        if rank < true_rank:
            best = float(torch.linalg.svdvals(problem.change[0])[rank:true_rank].square().sum())
            curves.append(
                Curve(panel, "best rank-r matrix", [0, steps], [best, best], kind="bound")
            )
    title = f"Error at ranks below, at and above the true one, {settings.problem.kind} model"
    y = Axis("error |BA - Delta|_F^2", "log", FLOOR)
    return [Picture("error_by_rank", title, Axis(STEP), y, curves, share_y=False)]


def steps_by_kappa(settings: TheorySettings) -> list[Picture]:
    """Draw the steps to a fixed error against the condition number, with and without preconditioner."""
    kappas = settings.sweep.many_kappas
    rank = settings.problem.true_rank
    problem = make_problem(settings, np.random.default_rng(settings.problem.seed), kappas)
    most = math.ceil(20 * max(5, *kappas) / settings.descent.lr)

    def reached(update: torch.Tensor) -> torch.Tensor:
        return frobenius(update - problem.change) <= TOLERANCE

    curves, panel = [], f"r = r* = {rank}"
    for method in METHODS:
        path = updates(settings, problem, method, rank, most, singular=False)
        found = steps_until(reached, path, len(kappas)).tolist()
        curves.append(Curve(panel, method.label, kappas, found))
    one = curves[2].y[0]
    line = [one * kappa / kappas[0] for kappa in kappas]
    curves.append(Curve(panel, "proportional to kappa", kappas, line, kind="bound"))
    title = f"Steps to |BA - Delta|_F = {TOLERANCE:g} |Delta|, {settings.problem.kind} model"
    x = Axis("condition number kappa of Delta", "log")
    return [Picture("steps_by_kappa", title, x, Axis("steps", "log"), curves)]


def spectral_error(settings: TheorySettings) -> list[Picture]:
    """Draw the spectral start's error against the number of samples, with its bound."""
    given, per_input = settings.problem, settings.sweep.samples_per_input
    kappas = [given.kappa] * settings.sweep.draws
    ranks = [max(1, given.true_rank // 2), given.true_rank, 2 * given.true_rank]
    found: dict[tuple[int, str], list[float]] = {}
    for many in per_input:
        rng = np.random.default_rng(given.seed)
        problem = make_problem(settings, rng, kappas, samples=many * given.inputs)
        for rank in ranks:
            lora_A, lora_B = spectral_start(problem, rank)
            error = spectral_norm(lora_B @ lora_A - problem.change)
            found.setdefault((rank, "error"), []).append(float(error.mean()))
            if isinstance(problem, LinearProblem):
                bound = spectral_norm(problem.second_moment - torch.eye(given.inputs).double())
                found.setdefault((rank, "bound"), []).append(float(bound.mean()))
    curves = []
    for rank in ranks:
        panel = f"r = {rank}, r* = {given.true_rank}"
        label = f"spectral start, mean of {settings.sweep.draws}"
        curves.append(Curve(panel, label, per_input, found[rank, "error"]))
        if rank >= given.true_rank and (rank, "bound") in found:
            bound_label = "bound |Sigma - I|_op (Thm 3.3)"
            curves.append(Curve(panel, bound_label, per_input, found[rank, "bound"], kind="bound"))
        if rank < given.true_rank:
            left = float(torch.linalg.svdvals(problem.change[0])[rank])
            row = [left] * len(per_input)
            curves.append(Curve(panel, "best rank-r matrix", per_input, row, kind="bound"))
        elif isinstance(problem, ReluProblem):
            G = problem.expected_gradient(torch.zeros_like(problem.change)) / problem.gamma
            row = [float(spectral_norm(-G - problem.change).mean())] * len(per_input)
            curves.append(
                Curve(panel, "error for N to infinity, any rank", per_input, row, "bound")
            )
    title = f"Error of the spectral start, {given.kind} model"
    y = Axis("|BA - Delta|_op / |Delta|_op", "log")
    return [Picture("spectral_error", title, Axis("samples per input N / n", "log"), y, curves)]


def convergence_bounds(checks: Sequence[Check]) -> list[Picture]:
    """Draw measured / bound against steps of the theorems of convergence, over their instances."""
    curves = []
    for check in checks:
        ratio = check.measured / check.bound
        steps = range(1, 1 + ratio.shape[1])
        count = check.instances
        for label, row in (("largest", ratio.amax(0)), ("median", ratio.median(0).values)):
            curves.append(Curve(check.name, f"{label} of {count} instances", steps, row.tolist()))
        curves.append(Curve(check.name, "the bound", [0, steps[-1]], [1, 1], kind="bound"))
    y = Axis("|BA - Delta|_F / its bound", "log", 1e-6)
    return [Picture("convergence_bounds", "Convergence against its bound", Axis(STEP), y, curves)]
