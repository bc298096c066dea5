"""Figures of the ReLU model alone."""

import numpy as np
import torch
from torch.linalg import matrix_norm

from app.commands.theory.descent import descend, random_init, spectral_init
from app.commands.theory.experiments import STEP
from app.commands.theory.figures import Axis, Curve, Picture
from app.commands.theory.instances import leading_left, misalignment
from app.commands.theory.methods import make_problem
from app.commands.theory.settings import TheorySettings

GAMMAS = tuple(0.5 + 0.25 * i for i in range(11))
"""The paper's gamma, from 0.5 to 3; ours is its inverse."""


def angles(settings: TheorySettings) -> list[Picture]:
    """Draw the angles of both factors to Delta's spaces, from LoRA's initialization and the spectral one."""
    given, rank = settings.descent, settings.problem.true_rank
    rng = np.random.default_rng(settings.problem.seed)
    problem = make_problem(settings, [settings.problem.kappa], rng=rng)
    output, inputs = leading_left(problem.change, rank), leading_left(problem.change.mT, rank)
    initializations = {
        "LoRA, gradient descent": random_init(rng, problem, rank, given.init_variance**0.5),
        "spectral initialization, gradient descent": spectral_init(problem, rank),
    }
    curves, steps = [], range(1, given.steps + 1)
    for label, initial in initializations.items():
        path = list(descend(problem, initial, given.lr, given.steps))[1:]
        on_output = [float(misalignment(output, lora_B)) for _, lora_B in path]
        on_input = [float(misalignment(inputs, lora_A.mT)) for lora_A, _ in path]
        curves.append(Curve("output side: lora_B", label, steps, on_output))
        curves.append(Curve("input side: lora_A", label, steps, on_input))
    title = f"Alignment at rank r = r* = {rank}, kappa = {settings.problem.kappa:g}, relu model"
    y = Axis("sine of the largest angle to the space of Delta", "log")
    return [Picture("alignment", title, Axis(STEP), y, curves)]


def error_by_gamma(settings: TheorySettings) -> list[Picture]:
    """Draw the spectral initialization's error over gamma: the theory says 2, as E[dL/dW] ~ -Delta / 2."""
    given, rank = settings.problem, settings.problem.true_rank
    kappas, panel = (
        [given.kappa] * settings.sweep.draws,
        f"r = r* = {rank}, kappa = {given.kappa:g}",
    )
    curves = []
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
