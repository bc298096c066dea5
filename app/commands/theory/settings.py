"""Settings of `python train.py theory`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from app.utils.errors import InputError


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"{name} is {value}: expected {expected}")


def _check_at_least(section: str, settings: object, **lowest: float) -> None:
    """Check numbers, and all numbers of lists, which may not be empty, against the smallest allowed."""
    for name, low in lowest.items():
        value = getattr(settings, name)
        several = isinstance(value, list)
        numbers = value if several else [value]
        right = bool(numbers) and all(low <= number < math.inf for number in numbers)
        expected = f"numbers of at least {low}" if several else f"at least {low}"
        _check(f"{section}.{name}", value, right, expected)


def _check_positive(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _check(f"{section}.{name}", value, 0 < value < math.inf, "more than 0")


@dataclass(frozen=True)
class ProblemSettings:
    """The problem of the figures.

    Args:
        kind: `linear` is y = W x; `relu` is y = relu(W x).
        inputs: n, length of x.
        outputs: m, number of outputs.
        samples: N, number of samples.
        true_rank: r*, rank of Delta; its singular values are evenly spaced from 1 to 1 / kappa.
        kappa: Condition number of Delta, where a figure does not sweep it.
        signal: Of `relu`: rows of W are this many times as long as the longest row of Delta.
        seed: Seed of every random draw.
    """

    kind: Literal["linear", "relu"] = "linear"
    inputs: int = 100
    outputs: int = 100
    samples: int = 6400
    true_rank: int = 4
    kappa: float = 4.0
    signal: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least("problem", self, inputs=2, outputs=2, kappa=1, seed=0)
        _check_positive("problem", self, "signal")
        more = f"more than problem.inputs ({self.inputs}): the theory needs n < N"
        _check("problem.samples", self.samples, self.samples > self.inputs, more)
        side = min(self.inputs, self.outputs)
        sixth = f"1 to a sixth of the smaller of problem.inputs and problem.outputs ({side})"
        _check("problem.true_rank", self.true_rank, 1 <= 6 * self.true_rank <= side, sixth)


@dataclass(frozen=True)
class DescentSettings:
    """Gradient descent in the figures; Delta's largest singular value is 1.

    Args:
        lr: Step size of plain gradient descent.
        preconditioned_lr: Step size of preconditioned gradient descent.
        steps: Steps of the loss curves.
        damping: Of the preconditioner where a Gram matrix is singular: from LoRA's random initialization, and
            at ranks above the true one. Elsewhere it is 0, as in the theorems.
        init_variance: Variance of the entries of LoRA's random lora_A.
    """

    lr: float = 0.3
    preconditioned_lr: float = 0.5
    steps: int = 150
    damping: float = 1e-3
    init_variance: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("descent", self, "lr", "preconditioned_lr", "damping", "init_variance")
        _check_at_least("descent", self, steps=1)


@dataclass(frozen=True)
class AlignmentSettings:
    """The figures of alignment from LoRA's random initialization, of the linear model, at rank 2 r*.

    Args:
        kappa: Condition number of Delta there.
        lr: Step size.
        steps: Number of steps.
        variances: Variances of the entries of the initial lora_A.
        sizes: m = n of the figures over sizes, with as many samples per input as the problem has.
    """

    kappa: float = 1.0
    lr: float = 1 / 64
    steps: int = 1500
    variances: list[float] = field(default_factory=lambda: [1.0, 0.1, 1e-2, 1e-3, 1e-4])
    sizes: list[int] = field(default_factory=lambda: [25, 50, 100])

    def __post_init__(self) -> None:
        _check_at_least("alignment", self, kappa=1, steps=1)
        _check_positive("alignment", self, "lr")
        right = bool(self.variances) and all(0 < v < math.inf for v in self.variances)
        _check("alignment.variances", self.variances, right, "numbers above 0")


@dataclass(frozen=True)
class SweepSettings:
    """What the figures go through.

    Args:
        kappas: Condition numbers of the loss curves, one panel each.
        many_kappas: Condition numbers of the figure of step counts.
        samples_per_input: N / n of the figure of the spectral initialization's error.
        draws: Random draws behind each point of that figure.
    """

    kappas: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0])
    many_kappas: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0, 30.0, 100.0])
    samples_per_input: list[int] = field(default_factory=lambda: [2, 4, 16, 64, 256])
    draws: int = 5

    def __post_init__(self) -> None:
        _check_at_least("sweep", self, kappas=1, many_kappas=1, samples_per_input=2, draws=1)


@dataclass(frozen=True)
class TheoryOutput:
    """Where the command writes.

    Args:
        name: Name of the experiment; runs go to ROOT/NAME/version_0, version_1, ...
        root: Folder of all runs.
        instances: Random instances on which each theorem is checked.
    """

    name: str = "theory"
    root: str = "runs"
    instances: int = 100

    def __post_init__(self) -> None:
        _check_at_least("output", self, instances=1)


@dataclass(frozen=True)
class TheorySettings:
    """All of them."""

    problem: ProblemSettings
    descent: DescentSettings
    alignment: AlignmentSettings
    sweep: SweepSettings
    output: TheoryOutput

    def __post_init__(self) -> None:
        rank, sizes = self.problem.true_rank, self.alignment.sizes
        expected = f"sizes of at least 2 problem.true_rank ({2 * rank})"
        right = bool(sizes) and min(sizes) >= 2 * rank
        _check("alignment.sizes", sizes, right, expected)
        for name, kappas in (
            ("alignment.kappa", [self.alignment.kappa]),
            ("problem.kappa", [self.problem.kappa]),
            ("sweep.kappas", self.sweep.kappas),
            ("sweep.many_kappas", self.sweep.many_kappas),
        ):
            _check(name, kappas, rank > 1 or set(kappas) == {1}, "1 where problem.true_rank is 1")
