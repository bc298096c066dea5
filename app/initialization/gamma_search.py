"""Search a gamma that lowers the task loss, by forward passes over some of the initialization rows."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from app.distributed.collectives import sum_over_processes
from app.initialization.factors import SVD
from app.initialization.gradient_hooks import frozen
from app.models.batch import Batch
from app.models.lora import LoraPair, install
from app.models.loss import Weighting, supervised_logits
from app.models.task_loss import RowLosses, label_losses, token_losses

PASSES = 4  # over the rows: of the untouched model, and of three gammas
FACTOR = 4.0  # between neighbouring gammas


class Difference(NamedTuple):
    """A mean loss beside that of the untouched model on the same rows, of all processes."""

    loss: float
    excess: float  # above the untouched model's
    error: float  # standard error of the excess


@dataclass(frozen=True)
class GammaSearch:
    """What a search came to."""

    gamma: float | None  # None: training starts from the untouched model
    untouched: float  # task loss of the untouched model
    trials: dict[float, Difference]  # by gamma, in their order
    seconds: float


def task_losses(
    model: nn.Module,
    base: PreTrainedModel,
    batches: Sequence[Batch],
    label_token_ids: Sequence[int],
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    weighting: Weighting = "tokens",
) -> RowLosses:
    """Return the task's own loss of each row of this process, in evaluation mode.

    Of a row with a class it is the cross-entropy among the label words alone (`label_losses`), of other rows
    the training loss.

    Args:
        model: The PEFT model that is called, with the adapter as it is.
        base: The transformers model inside it.
        batches: This process's share of the rows; all processes have as many.
        label_token_ids: First token of each label word, in the order of the classes; none without classes.
        device: The model's.
        forward_context: Makes the trainer's precision context, such as autocast.
        weighting: What the mean of rows without classes is over: tokens, or rows, each with its tokens' mean.
    """
    ids = torch.tensor(label_token_ids, dtype=torch.int64, device=device)
    parts = []
    with frozen(model), torch.no_grad():
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            with forward_context():
                supervised = supervised_logits(model, base, moved)
            parts.append(
                label_losses(supervised, ids, moved["target"])[0]
                if label_token_ids
                else token_losses(supervised, moved["index"] >= 0, weighting)
            )
    return RowLosses(*(torch.cat(part) for part in zip(*parts, strict=True)))


def difference(losses: RowLosses, untouched: RowLosses) -> Difference:
    """Compare a model with the untouched one on the same rows of all processes.

        excess = sum_i (a_i - b_i) / sum_i c_i,    a_i, b_i the sums of row i, c_i its count
        error = sqrt(n / (n - 1) sum_i (a_i - b_i - excess c_i)^2) / sum_i c_i

    that is, the standard error of a ratio of means over n rows, infinite for a single row.
    """
    a, b, c = losses.sums, untouched.sums, losses.counts
    d = a - b
    terms = [a.sum(), d.sum(), c.sum(), (c > 0).double().sum()]
    squares = [(d * d).sum(), (d * c).sum(), (c * c).sum()]
    total, change, count, rows, dd, dc, cc = sum_over_processes(
        torch.stack([*terms, *squares])
    ).tolist()
    excess = change / count
    residual = max(dd - 2 * excess * dc + excess**2 * cc, 0.0)
    error = math.sqrt(rows / (rows - 1) * residual) / count if rows > 1 else math.inf
    return Difference(total / count, excess, error)


def first_gamma(steps: Iterable[tuple[float, SVD]], unit: float | None, loss: float) -> float:
    """Return the power of two next to the gamma whose step would, to first order, take the whole loss away.

        loss = sum over layers of scaling * sum_i S_i^2 / (unit * gamma)

    Args:
        steps: Scaling of each layer, and the triplets of its gradient that are installed.
        unit: As for `spectral_factors`.
        loss: The loss whose gradient it is, of the untouched model.

    Source: Polyak's step size, (f - min f) / |g|^2, with 0 for the minimum.
    """
    decrease = sum(
        scaling * float(svd.S.double().square().sum()) / (float(svd.S[0]) if unit is None else unit)
        for scaling, svd in steps
    )
    return 2.0 ** round(math.log2(decrease / loss))


def search_gamma(
    bound_at: Callable[[float], float], first: float
) -> tuple[float | None, dict[float, float]]:
    """Search the gamma with the smallest bound: the initialization's direction is given, its size is not.

    Tries `first` and a step of a quarter of its size; then, on the side of the better one, a step that is a
    factor of 4 larger or smaller than both.

    Args:
        bound_at: Installs the factors with a gamma and returns an upper bound of what the loss gains.
        first: Where to begin.

    Returns:
        The best gamma, or None if no bound is negative; and the bound at each gamma, in their order.
    """
    bounds: dict[float, float] = {}

    def better() -> float:
        # Of equal ones, such as infinite ones, the smaller step.
        return min(bounds, key=lambda gamma: (bounds[gamma], -gamma))

    def try_gamma(gamma: float) -> None:
        bound = bound_at(gamma)
        bounds[gamma] = bound if math.isfinite(bound) else math.inf

    for gamma in (first, first * FACTOR):
        try_gamma(gamma)
    try_gamma(first / FACTOR if better() == first else first * FACTOR**2)
    return (better() if bounds[better()] < 0 else None), bounds


def install_best(
    pairs: Sequence[LoraPair],
    install_step: Callable[[float], None],
    losses: Callable[[], RowLosses],
    first: float,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda passes, label: passes,
) -> GammaSearch:
    """Install the step that lowers the loss most surely; leave the pairs as they were where none does.

    Of a step counts what it gains beside the untouched model on the same rows, less the standard error of that:
    a large step changes the rows' losses up and down, and few rows can flatter it.

    Args:
        pairs: New LoRA pairs, lora_B = 0: the model is the untouched one.
        install_step: Fills the pairs with the factors of a gamma.
        losses: Returns the losses of the model as it is; called four times.
        first: The first gamma to try.
        progress: Shows, under a label, how many passes are done.
    """
    began = time.perf_counter()
    usual = [(pair, pair.lora_A.detach().clone(), pair.lora_B.detach().clone()) for pair in pairs]
    passes = iter(progress(range(PASSES), "search of gamma"))
    next(passes)
    untouched = losses()
    trials: dict[float, Difference] = {}

    def bound_at(gamma: float) -> float:
        next(passes)
        install_step(gamma)
        trials[gamma] = difference(losses(), untouched)
        return trials[gamma].excess + trials[gamma].error

    gamma, _ = search_gamma(bound_at, first)
    next(passes, None)  # ends the progress
    if gamma is None:
        for pair, lora_A, lora_B in usual:
            install(pair, lora_A, lora_B)
    else:
        install_step(gamma)
    seconds = time.perf_counter() - began
    return GammaSearch(gamma, difference(untouched, untouched).loss, trials, seconds)
