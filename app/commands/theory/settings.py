"""Settings of `python train.py theory`."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from app.utils.errors import InputError

AT_LEAST = {
    0: ("problem.seed",),
    1: (
        *("problem.kappa", "descent.steps", "alignment.kappa", "alignment.steps"),
        *("sweep.kappas", "sweep.many_kappas", "sweep.draws", "output.instances"),
    ),
    2: ("problem.inputs", "problem.outputs", "sweep.samples_per_input"),
}
"""Settings by their smallest number; lists may not be empty."""

ABOVE_ZERO = (
    *("problem.signal", "descent.lr", "descent.preconditioned_lr", "descent.damping"),
    *("descent.init_variance", "alignment.lr", "alignment.variances"),
)


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


@dataclass(frozen=True)
class TheorySettings:
    """All of them; they are checked together."""

    problem: ProblemSettings
    descent: DescentSettings
    alignment: AlignmentSettings
    sweep: SweepSettings
    output: TheoryOutput

    def __post_init__(self) -> None:
        for low, names in AT_LEAST.items():
            for name in names:
                self._check_each(name, low, f"at least {low}")
        for name in ABOVE_ZERO:
            self._check_each(name, math.ulp(0), "more than 0")
        given, sizes = self.problem, self.alignment.sizes
        rank, side = given.true_rank, min(given.inputs, given.outputs)
        more = f"more than problem.inputs ({given.inputs}): the theory needs n < N"
        _check("problem.samples", given.samples, given.samples > given.inputs, more)
        sixth = f"1 to a sixth of the smaller of problem.inputs and problem.outputs ({side})"
        _check("problem.true_rank", rank, 1 <= 6 * rank <= side, sixth)
        large = f"sizes of at least 2 problem.true_rank ({2 * rank})"
        _check("alignment.sizes", sizes, bool(sizes) and min(sizes) >= 2 * rank, large)
        for name in ("alignment.kappa", "problem.kappa", "sweep.kappas", "sweep.many_kappas"):
            kappas = _numbers(attrgetter(name)(self))
            _check(name, kappas, rank > 1 or set(kappas) == {1}, "1 where problem.true_rank is 1")

    def _check_each(self, name: str, low: float, expected: str) -> None:
        value = attrgetter(name)(self)
        numbers = _numbers(value)
        right = bool(numbers) and all(low <= number < math.inf for number in numbers)
        _check(name, value, right, f"numbers of {expected}" if value is numbers else expected)


def _numbers(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"{name} is {value}: expected {expected}")
