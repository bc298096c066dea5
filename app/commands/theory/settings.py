"""Settings of `python train.py theory`."""

from dataclasses import dataclass, field
from typing import Literal

from app.utils.errors import InputError


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise InputError(f"{name} is {value}: expected {expected}")


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
        smaller = min(self.inputs, self.outputs)
        _check("problem.inputs", self.inputs, self.inputs >= 2, "at least 2")
        _check("problem.outputs", self.outputs, self.outputs >= 2, "at least 2")
        _check(
            "problem.samples",
            self.samples,
            self.samples > self.inputs,
            f"more than problem.inputs ({self.inputs}): the theory needs n < N",
        )
        _check(
            "problem.true_rank",
            self.true_rank,
            1 <= 6 * self.true_rank <= smaller,
            f"1 to a sixth of the smaller of problem.inputs and problem.outputs ({smaller})",
        )
        _check("problem.kappa", self.kappa, 1 <= self.kappa < float("inf"), "at least 1")
        _check("problem.signal", self.signal, 0 < self.signal < float("inf"), "more than 0")
        _check("problem.seed", self.seed, self.seed >= 0, "at least 0")


@dataclass(frozen=True)
class DescentSettings:
    """Gradient descent in the figures; Delta's largest singular value is 1.

    Args:
        lr: Step size of plain gradient descent.
        preconditioned_lr: Step size of preconditioned gradient descent.
        steps: Steps of the loss curves.
        damping: Of the preconditioner where a Gram matrix is singular: from LoRA's random start, and at
            ranks above the true one. Elsewhere it is 0, as in the theorems.
        start_variance: Variance of the entries of LoRA's random lora_A.
    """

    lr: float = 0.3
    preconditioned_lr: float = 0.5
    steps: int = 150
    damping: float = 1e-3
    start_variance: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("lr", "preconditioned_lr", "damping", "start_variance"):
            value = getattr(self, name)
            _check(f"descent.{name}", value, 0 < value < float("inf"), "more than 0")
        _check("descent.steps", self.steps, self.steps >= 1, "at least 1")


@dataclass(frozen=True)
class AlignmentSettings:
    """The figures of alignment from LoRA's random start, of the linear model, at rank 2 r*.

    Args:
        kappa: Condition number of Delta there.
        lr: Step size.
        steps: Number of steps.
        variances: Variances of the entries of lora_A at the start.
        sizes: m = n of the figures over sizes, with as many samples per input as the problem has.
    """

    kappa: float = 1.0
    lr: float = 1 / 64
    steps: int = 1500
    variances: list[float] = field(default_factory=lambda: [1.0, 0.1, 1e-2, 1e-3, 1e-4])
    sizes: list[int] = field(default_factory=lambda: [25, 50, 100])

    def __post_init__(self) -> None:
        _check("alignment.kappa", self.kappa, 1 <= self.kappa < float("inf"), "at least 1")
        _check("alignment.lr", self.lr, 0 < self.lr < float("inf"), "more than 0")
        _check("alignment.steps", self.steps, self.steps >= 1, "at least 1")
        right = bool(self.variances) and all(0 < v < float("inf") for v in self.variances)
        _check("alignment.variances", self.variances, right, "numbers above 0")
        _check("alignment.sizes", self.sizes, bool(self.sizes), "at least one size")


@dataclass(frozen=True)
class SweepSettings:
    """What the figures go through.

    Args:
        kappas: Condition numbers of the loss curves, one panel each.
        many_kappas: Condition numbers of the figure of step counts.
        samples_per_input: N / n of the figure of the spectral start's error.
        draws: Random draws behind each point of that figure.
    """

    kappas: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0])
    many_kappas: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0, 30.0, 100.0])
    samples_per_input: list[int] = field(default_factory=lambda: [2, 4, 16, 64, 256])
    draws: int = 5

    def __post_init__(self) -> None:
        for name, low in (("kappas", 1), ("many_kappas", 1), ("samples_per_input", 2)):
            values = getattr(self, name)
            right = bool(values) and all(low <= v < float("inf") for v in values)
            _check(f"sweep.{name}", values, right, f"numbers of at least {low}")
        _check("sweep.draws", self.draws, self.draws >= 1, "at least 1")


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
        _check("output.instances", self.instances, self.instances >= 1, "at least 1")


@dataclass(frozen=True)
class TheorySettings:
    """All of them."""

    problem: ProblemSettings
    descent: DescentSettings
    alignment: AlignmentSettings
    sweep: SweepSettings
    output: TheoryOutput

    def __post_init__(self) -> None:
        rank = self.problem.true_rank
        sizes = self.alignment.sizes
        expected = f"sizes of at least 2 problem.true_rank ({2 * rank})"
        _check("alignment.sizes", sizes, min(sizes) >= 2 * rank, expected)
        every = {
            "alignment.kappa": [self.alignment.kappa],
            "problem.kappa": [self.problem.kappa],
            "sweep.kappas": self.sweep.kappas,
            "sweep.many_kappas": self.sweep.many_kappas,
        }
        for name, kappas in every.items():
            _check(name, kappas, rank > 1 or set(kappas) == {1}, "1 where problem.true_rank is 1")
