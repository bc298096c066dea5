"""The command line of `python train.py one_step`, and the grid of steps that it asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field

from app.utils.command_parser import CommandParser, check_not_misspelt, parse_list
from app.utils.errors import InputError

ONE_STEP = """Score one step of the base weights, W - eta G, and no training: the paper's first experiment.

  python train.py one_step --config glue_mrpc.yaml --samples 8,2048 --ranks 8,full

G is the gradient over --samples training rows, whole (full) or its best approximation of a rank. Training rows
that are in no gradient choose eta; the validation rows score the model at the chosen one. Options of fit, such
as --data.path, are those of the run; what belongs to the training loop changes nothing. The same command goes
on after an interruption, and a wider grid adds to it."""

HALF_DECADES = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-10, 3))
"""Six decades, from 1e-5 to 10."""

Scale = Literal["global", "layer"]
Rank = Annotated[int, Field(gt=0)] | Literal["full"]
Samples = Annotated[int, Field(gt=0)]
Eta = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Step(NamedTuple):
    """The step W - eta G_r / s of every adapted layer.

    G_r is the best approximation of G of rank `rank`, or G for `full`; s is the layer's own S_1(G) for the
    scale `layer`, the largest of all layers for `global`: eta is the spectral norm of the largest step.
    """

    samples: int  # training rows of G
    rank: Rank
    scale: Scale
    eta: float


UNTOUCHED = Step(0, "full", "global", 0.0)
"""No step."""


@dataclass(frozen=True)
class Grid:
    """The steps to score.

    Args:
        samples: Training rows of each gradient; empty takes those of the initialization.
        ranks: Ranks of the step; empty takes the adapter's and the whole gradient.
        scales: What a step is divided by, see `Step`.
        etas: Sizes of the step, in ascending order; one is chosen for each of the others.
        eta_rows: Training rows that choose it, and are in no gradient.
    """

    samples: tuple[int, ...]
    ranks: tuple[Rank, ...]
    scales: tuple[Scale, ...]
    etas: tuple[float, ...]
    eta_rows: int

    def completed(self, num_samples: int, rank: int) -> "Grid":
        """Return the grid for a run with so many initialization samples and an adapter of that rank."""
        ranks = self.ranks or (rank, "full")
        return replace(self, samples=self.samples or (num_samples,), ranks=ranks)

    @property
    def largest_rank(self) -> int:
        """The largest rank that is a number; 1 where there is none."""
        return max([1, *(rank for rank in self.ranks if isinstance(rank, int))])

    def series(self, samples: int) -> list[list[Step]]:
        """Return the steps from one gradient; those that differ in eta alone stand together."""
        return [
            [Step(samples, rank, scale, eta) for eta in self.etas]
            for scale in self.scales
            for rank in self.ranks
        ]


def one_step(
    arguments: Sequence[str], run: Callable[[Sequence[str], Grid, Path | None], int]
) -> int:
    """Run `one_step` with the arguments after its name.

    Args:
        arguments: Options of this command and of `fit`.
        run: Scores the steps of a run: takes the options of `fit`, the grid and the folder to write, if one is
            given; returns the exit status.

    Raises:
        InputError: An option is wrong.
    """
    parser = CommandParser("one_step", ONE_STEP)
    add = parser.add_argument
    add("--samples", help="training rows of G, such as 8,64,2048; default init.num_samples")
    add("--ranks", help="such as 8,32,full; default model.adapter.r and full")
    scales = "one eta for all layers as in the paper (global), each layer's step divided by its own S_1 (layer)"
    add("--scale", default="global,layer", help=f"{scales}; default both, global,layer")
    etas = (
        "spectral norms of the largest layer's step, or of each layer's, before it is cut to a rank"
    )
    add("--etas", help=f"{etas}; default 13 from 1e-5 to 10")
    add("--eta_rows", type=int, default=64, help="training rows that choose eta; default 64")
    add("--output", type=Path, help="folder to write; default ROOT/NAME/one_step")
    given, rest = parser.parse_known_args(arguments)
    check_not_misspelt(rest, given)
    if given.eta_rows < 1:
        raise InputError(f"--eta_rows is {given.eta_rows}: expected at least 1")

    def values(name: str, kind: Any, expected: str) -> tuple[Any, ...]:
        text = getattr(given, name)
        return () if text is None else tuple(parse_list(f"--{name}", text, kind, expected))

    grid = Grid(
        values("samples", Samples, "whole numbers above 0, such as 8,64"),
        values("ranks", Rank, "whole numbers above 0 or full, such as 8,32,full"),
        values("scale", Scale, " or ".join(get_args(Scale))),
        tuple(sorted(values("etas", Eta, "numbers above 0, such as 1e-3,1e-2"))) or HALF_DECADES,
        given.eta_rows,
    )
    return run(rest, grid, given.output)
