"""Figures of the alignment of LoRA's factors, and of paths in a plane."""

import math
from typing import NamedTuple

import torch
from numpy.random import default_rng
from torch import Tensor
from torch.linalg import matrix_norm

from app.commands.theory.descent import (
    descend,
    first_step,
    make_problem,
    random_init,
    spectral_init,
)
from app.commands.theory.experiments import STEP
from app.commands.theory.figures import Axis, Curve, Picture
from app.commands.theory.problems import (
    LinearProblem,
    aligning_deviation,
    column,
    leading_left,
    low_rank_change,
    misalignment,
    normal,
    outside,
    sample_second_moment,
    second_moment_of,
    spaced,
)
from app.commands.theory.settings import TheorySettings
from app.initialization.factors import LoraFactors

ANGLE = "sine of the largest angle to the space of G"
THETA = 0.1
MOMENTS = 150
"""Angles are taken at about so many steps of a descent."""


def angles(settings: TheorySettings) -> list[Picture]:
    """Draw how LoRA's factors align with the one-step gradient, over sizes of the random initialization."""
    given, curves = settings.problem, []
    run = _align(settings, given.outputs, given.inputs)
    output, inputs = "output side: lora_B (exact from step 1)", "input side: lora_A"
    for i, variance in enumerate(settings.alignment.variances):
        label = f"initial variance {variance:g}"
        curves.append(Curve(output, label, run.steps[1:], run.output[i, 1:].tolist()))
        curves.append(Curve(inputs, label, run.steps[1:], run.input[i, 1:].tolist()))
    label = "linearised descent, any variance"
    curves.append(Curve(inputs, label, run.steps[1:], run.linearised[1:], kind="bound"))
    title = f"Alignment from LoRA's initialization, {_ranks(settings)}"
    y = Axis(ANGLE, "log", 0.03)
    return [Picture("alignment", title, Axis(STEP), y, curves, share_y=False)]


def relu_angles(settings: TheorySettings) -> list[Picture]:
    """Draw the angles of both factors to Delta's spaces, from LoRA's initialization and the spectral one."""
    given, rank = settings.descent, settings.problem.true_rank
    rng = default_rng(settings.problem.seed)
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


def angle_by_size(settings: TheorySettings) -> list[Picture]:
    """Draw the smallest angle and the last risk over the size of the initialization (the paper's Fig. 2)."""
    given, variances = settings.alignment, settings.alignment.variances
    smallest, risks = [], []
    for size in given.sizes:
        run = _align(settings, size, size)
        label = f"m = n = {size}"
        smallest.append(Curve("input side", label, variances, run.input.amin(-1).tolist()))
        risks.append(Curve(f"after {given.steps} steps", label, variances, run.risk.tolist()))
    x = Axis("variance of the entries of the initial lora_A", "log")
    ranks, risk = _ranks(settings), Axis("risk |BA - Delta|_F^2", "log")
    title = f"Smallest angle over the steps, {ranks}"
    return [
        Picture("smallest_angle", title, x, Axis(ANGLE), smallest),
        Picture("risk", f"Risk from LoRA's initialization, {ranks}", x, risk, risks),
    ]


def _ranks(settings: TheorySettings) -> str:
    rank = settings.problem.true_rank
    return f"r = {2 * rank}, r* = {rank}, kappa = {settings.alignment.kappa:g}"


class _Run(NamedTuple):
    """Descents from random initializations of several variances, which differ in nothing else."""

    steps: list[int]
    output: Tensor
    """Angle of lora_B's space to that of G (variances, steps)."""
    input: Tensor
    """Angle of lora_A's space to that of G (variances, steps)."""
    linearised: list[float]
    """What bounds the latter as long as the descent is linear."""
    risk: Tensor
    """After the last step (variances,)."""


def _align(settings: TheorySettings, m: int, n: int) -> _Run:
    given, true_rank = settings.alignment, settings.problem.true_rank
    rng = default_rng(settings.problem.seed)
    values = spaced(true_rank, torch.tensor([given.kappa], dtype=torch.float64))
    samples = max(n + 1, n * settings.problem.samples // settings.problem.inputs)
    change = low_rank_change(rng, values, m, n)
    moment = sample_second_moment(rng, 1, n, samples)
    many = len(given.variances)
    problem = LinearProblem(change.expand(many, -1, -1), moment.expand(many, -1, -1))
    scales = torch.tensor(given.variances, dtype=torch.float64).sqrt()
    A_0 = normal(rng, 1, 2 * true_rank, n)
    initial = LoraFactors(column(scales) * A_0, torch.zeros(many, m, 2 * true_rank).double())
    U, S, Vh = torch.linalg.svd(problem.gradient(torch.zeros_like(problem.change)))
    output, inputs = U[..., :true_rank], Vh[:, :true_rank].mT
    weakest = torch.linalg.svdvals(A_0 @ inputs[:1])[0, -1]
    rho = float(matrix_norm(outside(inputs[:1], A_0.mT), 2)[0] / weakest)
    growth = given.lr * float(S[0, true_rank - 1])
    every = max(1, given.steps // MOMENTS)
    steps, on_output, on_input, linearised = [], [], [], []
    for t, (lora_A, lora_B) in enumerate(descend(problem, initial, given.lr, given.steps)):
        if t % every and t != 1:
            continue
        steps.append(t)
        on_output.append(misalignment(output, lora_B))
        on_input.append(misalignment(inputs, lora_A.mT))
        linearised.append(min(1.0, 2 * rho / ((1 + growth) ** t + (1 - growth) ** t)))
    risk = problem.risk(lora_B @ lora_A)
    return _Run(steps, torch.stack(on_output, 1), torch.stack(on_input, 1), linearised, risk)


def alignment_time(settings: TheorySettings) -> list[Picture]:
    """Draw the step at which lora_A reaches the angle theta against the theorem's time.

        T = ln(sqrt(n) / theta) / ln(1 + lr s_r*(G))          with the unknown constant set to 1

    over angles, step sizes and input lengths, with the initialization as small as the theorem wants it.
    """
    sweeps: dict[str, list[tuple[float, float, int]]] = {
        "theta from 0.3 to 0.001": [(x, 0.1, 64) for x in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)],
        "lr from 0.005 to 0.5": [(THETA, lr, 64) for lr in (0.005, 0.015, 0.05, 0.15, 0.5)],
        "n from 16 to 512": [(THETA, 0.1, n) for n in (16, 32, 64, 128, 256, 512)],
    }
    curves, times = [], []
    for label, places in sweeps.items():
        xs, ys = [], []
        for theta, lr, n in places:
            expected, measured = hitting_times(settings.problem.seed, theta, lr, n, 5)
            xs += expected
            ys += measured
        times += xs
        curves.append(Curve("r = 2 r* = 4, kappa 1 to 1.5", label, xs, ys, kind="points"))
    ends = [min(times), max(times)]
    curves.append(Curve(curves[0].panel, "T with constant 1", ends, ends, kind="bound"))
    x = Axis("T = ln(sqrt(n) / theta) / ln(1 + lr s_r*(G)), steps", "log")
    y = Axis("first step with angle <= theta", "log")
    return [Picture("alignment_time", "Time of alignment, input side", x, y, curves)]


def hitting_times(
    seed: int, theta: float, lr: float, n: int, count: int
) -> tuple[list[float], list[float]]:
    """Return the theorem's times and the first steps at which the sine of the angle is at most theta.

    |Delta| is 1, m is 16, the true rank 2, the rank 4, and Sigma from 40 n samples.
    """
    rng = default_rng(seed)
    kappa = torch.from_numpy(rng.uniform(1, 1.5, count))
    change = low_rank_change(rng, spaced(2, kappa), 16, n)
    problem = LinearProblem(change, sample_second_moment(rng, count, n, 40 * n))
    _, S, Vh = torch.linalg.svd(problem.gradient(torch.zeros_like(change)), full_matrices=False)
    space, alpha = Vh[:, :2].mT, aligning_deviation(theta, n, S[:, 0], S[:, 1])
    initial = random_init(rng, problem, 4, column(alpha))
    expected = math.log(math.sqrt(n) / theta) / torch.log1p(lr * S[:, 1])
    path = descend(problem, initial, lr, 4 * int(expected.max()))
    steps = first_step(path, lambda factors: misalignment(space, factors.lora_A.mT) <= theta, count)
    return expected.tolist(), steps


def paths(settings: TheorySettings) -> list[Picture]:
    """Draw the path of lora_B @ lora_A in the plane: two inputs, one output, rank 1, four samples."""
    rng = default_rng(settings.problem.seed)
    target = torch.tensor([[[2.0, 1.0]]], dtype=torch.float64)
    problem = LinearProblem(target, second_moment_of(normal(rng, 1, 4, 2)))
    lr, steps = 0.1, 1000
    panel = f"lr {lr}, {steps} steps"
    curves = []
    initializations = {f"LoRA, draw {i + 1}": random_init(rng, problem, 1, 1.0) for i in range(3)}
    initializations["spectral initialization"] = spectral_init(problem, 1)
    for label, initial in initializations.items():
        path = descend(problem, initial, lr, steps)
        x, y = torch.stack([(lora_B @ lora_A)[0, 0] for lora_A, lora_B in path]).T.tolist()
        curves.append(Curve(panel, label, x, y))
    curves.append(Curve(panel, "Delta", [2.0], [1.0], kind="points"))
    curves.append(Curve(panel, "W", [0.0], [0.0], kind="points"))
    title = "Descent of lora_B lora_A in the plane"
    return [Picture("paths", title, Axis("first entry"), Axis("second entry"), curves)]
