"""The curves of the figures against descents written out in numpy."""

import numpy as np
import pytest

from app.commands.theory.alignment import angles
from app.commands.theory.command import SECTIONS
from app.commands.theory.descent import LORA_GA_GAMMA, make_problem
from app.commands.theory.experiments import (
    DAMPINGS,
    TOLERANCE,
    error_by_gamma,
    error_by_rank,
    steps_by_damping,
    steps_by_kappa,
)
from app.commands.theory.settings import (
    AlignmentSettings,
    DescentSettings,
    ProblemSettings,
    SweepSettings,
    TheorySettings,
)

SMALL = ProblemSettings(inputs=24, outputs=20, samples=400, true_rank=2, kappa=3)


def settings(problem=SMALL, **sections):
    usual = {name: kind() for name, kind in SECTIONS.items()}
    return TheorySettings(**{**usual, "problem": problem, **sections})


def curve(picture, label, panel=None):
    [match] = [c for c in picture.curves if c.label == label and panel in (None, c.panel)]
    return list(match.y)


def first_problem(given, *kappas):
    """Return Delta and Sigma of each problem of a figure."""
    problem = make_problem(given, kappas)
    return [
        (change.numpy(), moment.numpy())
        for change, moment in zip(problem.change, problem.second_moment, strict=True)
    ]


def walk(change, moment, A, B, lr, steps, damping=None, offset=0.0, relative=0.0):
    """Yield what is added to W before and after each step of the descent in docs/theory.md."""
    yield offset + B @ A
    for _ in range(steps):
        G = (offset + B @ A - change) @ moment
        grad_A, grad_B = B.T @ G, G @ A.T
        if damping is not None:
            gram_A, gram_B = (
                gram + (damping + relative * np.linalg.eigvalsh(gram).mean()) * np.eye(len(A))
                for gram in (A @ A.T, B.T @ B)
            )
            grad_A, grad_B = np.linalg.solve(gram_B, grad_A), np.linalg.solve(gram_A, grad_B.T).T
        A, B = A - lr * grad_A, B - lr * grad_B
        yield offset + B @ A


def spectral(change, moment, rank):
    U, S, Vh = np.linalg.svd(change @ moment)
    root = np.sqrt(S[:rank])
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def test_steps_to_a_fixed_error():
    kappas = [1.0, 5.0]
    given = settings(sweep=SweepSettings(many_kappas=kappas))
    [picture] = steps_by_kappa(given)
    for label, lr, damping in (
        ("spectral initialization, gradient descent", given.descent.lr, None),
        (
            "spectral initialization, preconditioned (LoRA-One)",
            given.descent.preconditioned_lr,
            0.0,
        ),
    ):
        expected = []
        for change, moment in first_problem(given, *kappas):
            path = walk(change, moment, *spectral(change, moment, 2), lr, 2000, damping)
            errors = (np.linalg.norm(update - change) for update in path)
            expected.append(next(t for t, error in enumerate(errors) if error <= TOLERANCE))
        assert curve(picture, label) == expected
        assert min(expected) > 3


@pytest.mark.slow
def test_steps_by_damping():
    """In other units the relative damping has the same curve, and the absolute one is in those units."""
    given = settings(sweep=SweepSettings(kappas=[5.0]))
    [picture] = steps_by_damping(given)
    panels = [f"r = {r}, r* = 2, |Delta|_op = {size:g}" for r, size in ((2, 1), (4, 1), (4, 0.01))]
    [(change, moment)] = first_problem(given, 5.0)
    lr = given.descent.preconditioned_lr
    for label, damping, relative in (("damping", 1, 0), ("relative damping", 0, 1)):
        drawn = curve(picture, f"spectral initialization, {label}", panels[0])
        for place in (0, 3):
            value = DAMPINGS[place]
            initial = spectral(change, moment, 2)
            path = walk(
                change, moment, *initial, lr, 200, damping * value, relative=relative * value
            )
            errors = (np.linalg.norm(update - change) for update in path)
            assert drawn[place] == next(t for t, e in enumerate(errors) if e <= TOLERANCE) > 3
    for start in ("LoRA", "spectral initialization"):
        absolute, other = (curve(picture, f"{start}, damping", panel) for panel in panels[1:])
        np.testing.assert_allclose(other[:-2], absolute[2:], atol=1)
        for label in ("relative damping", "gradient descent"):
            same, again = (curve(picture, f"{start}, {label}", panel) for panel in panels[1:])
            np.testing.assert_allclose(again, same, atol=1)


def test_errors_of_lora_ga_with_what_it_subtracts_from_the_base():
    steps = 12
    given = settings(descent=DescentSettings(steps=steps))
    [picture] = error_by_rank(given)
    [(change, moment)] = first_problem(given, 3.0)
    U, _, Vh = np.linalg.svd(change @ moment)
    size = 20**0.25 / LORA_GA_GAMMA**0.5
    A, B = size * Vh[:2], size * U[:, 2:4]
    lr, damping = given.descent.preconditioned_lr, given.descent.damping
    path = walk(change, moment, A, B, lr, steps, damping, offset=-B @ A)
    expected = [np.linalg.norm(update - change) ** 2 for update in path]
    assert expected[0] == pytest.approx(np.linalg.norm(change) ** 2)
    drawn = curve(picture, "LoRA-GA, preconditioned", "r = 2, r* = 2")
    assert drawn == pytest.approx(expected, rel=1e-6)


def test_the_bound_of_the_angle_is_that_of_the_linearised_descent():
    """From factors so small that the descent stays linear, and at rank one, the angle comes to its bound."""
    problem = ProblemSettings(inputs=24, outputs=20, samples=400, true_rank=1, kappa=1)
    alignment = AlignmentSettings(kappa=1, lr=0.05, steps=150, variances=[1e-20])
    sweep = SweepSettings(kappas=[1], many_kappas=[1])
    [picture] = angles(settings(problem, alignment=alignment, sweep=sweep))
    panel = "input side: lora_A"
    measured = np.array(curve(picture, "initial variance 1e-20", panel))
    ratio = measured / np.array(curve(picture, "linearised descent, any variance", panel))
    assert ratio.max() <= 1
    assert ratio[-1] > 0.9
    assert measured[-1] < 0.1


def test_the_relu_initialization_is_best_at_the_gamma_of_the_theory():
    problem = ProblemSettings(kind="relu", inputs=12, outputs=12, samples=100, true_rank=2)
    sweep = SweepSettings(samples_per_input=[64, 1024], draws=2)
    [picture] = error_by_gamma(settings(problem, sweep=sweep))
    for many in sweep.samples_per_input:
        [drawn] = [c for c in picture.curves if c.label == f"N = {many} n"]
        assert drawn.x[int(np.argmin(drawn.y))] == pytest.approx(2, abs=0.3)
