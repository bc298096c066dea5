"""Figures of the ReLU model alone."""

import numpy as np
import torch

from app.commands.theory.descent import descend, random_start, spectral_start
from app.commands.theory.experiments import STEP
from app.commands.theory.figures import Axis, Curve, Picture
from app.commands.theory.instances import frobenius, leading_left, misalignment
from app.commands.theory.methods import make_problem
from app.commands.theory.settings import TheorySettings

GAMMAS = tuple(0.5 + 0.25 * i for i in range(11))
"""The paper's gamma, from 0.5 to 3; ours is its inverse."""


def angles(settings: TheorySettings) -> list[Picture]:
    """Draw the angles of both factors to Delta's spaces, from LoRA's start and the spectral one."""
    given, rank = settings.descent, settings.problem.true_rank
    rng = np.random.default_rng(settings.problem.seed)
    problem = make_problem(settings, rng, [settings.problem.kappa])
    output, inputs = leading_left(problem.change, rank), leading_left(problem.change.mT, rank)
    starts = {
        "LoRA, gradient descent": random_start(rng, problem, rank, given.start_variance**0.5),
        "spectral start, gradient descent": spectral_start(problem, rank),
    }
    curves = []
    for label, start in starts.items():
        way = list(descend(problem, start, given.lr, given.steps))[1:]
        steps = range(1, given.steps + 1)
        on_output = [float(misalignment(output, lora_B)) for _, lora_B in way]
        on_input = [float(misalignment(inputs, lora_A.mT)) for lora_A, _ in way]
        curves.append(Curve("output side: lora_B", label, steps, on_output))
        curves.append(Curve("input side: lora_A", label, steps, on_input))
    title = f"Alignment at rank r = r* = {rank}, kappa = {settings.problem.kappa:g}, relu model"
    y = Axis("sine of the largest angle to the space of Delta", "log")
    return [Picture("alignment", title, Axis(STEP), y, curves)]


def error_by_gamma(settings: TheorySettings) -> list[Picture]:
    """Draw the spectral start's error against gamma: the theory says 2, as E[dL/dW] ~ -Delta / 2."""
    given, rank = settings.problem, settings.problem.true_rank
    curves, panel = [], f"r = r* = {rank}, kappa = {given.kappa:g}"
    for many in settings.sweep.samples_per_input:
        rng = np.random.default_rng(given.seed)
        kappas = [given.kappa] * settings.sweep.draws
        problem = make_problem(settings, rng, kappas, samples=many * given.inputs)
        lora_A, lora_B = spectral_start(problem, rank, gamma=1.0)
        size = frobenius(problem.change)
        row = [
            float((frobenius(gamma * lora_B @ lora_A - problem.change) / size).mean())
            for gamma in GAMMAS
        ]
        curves.append(Curve(panel, f"N = {many} n", GAMMAS, row))
    ends = torch.tensor([c.y for c in curves])
    curves.append(
        Curve(panel, "gamma = 2", [2, 2], [float(ends.min()), float(ends.max())], kind="bound")
    )
    title = "Error of the spectral start over gamma, relu model"
    x, y = Axis("gamma (the paper's; ours is 1 / gamma)"), Axis("|BA - Delta|_F / |Delta|_F", "log")
    return [Picture("error_by_gamma", title, x, y, curves)]
