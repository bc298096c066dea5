"""Search the gamma with the smallest loss on the initialization set, by forward passes."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from app.distributed.collectives import sum_over_processes
from app.initialization.gradient_hooks import frozen
from app.initialization.one_step_gradient import count_supervised
from app.models.batch import Batch
from app.models.loss import Weighting, summed_loss, supervised_logits

FIRST_GAMMA = 128.0  # the authors' for language models
MAX_TRIALS = 8  # gammas that a search may try
FIRST_FACTOR = 4.0  # between the first gammas tried


def mean_loss(
    model: nn.Module,
    base: PreTrainedModel,
    batches: Sequence[Batch],
    device: torch.device,
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    weighting: Weighting = "tokens",
) -> float:
    """Return the mean of the loss over all processes' batches, in evaluation mode.

    See `one_step_gradients` for the arguments.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    with frozen(model), torch.no_grad():
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            with forward_context():
                total += summed_loss(supervised_logits(model, base, moved), weighting).double()
    return float(sum_over_processes(total)) / count_supervised(batches, device)[weighting]


def search_gamma(
    loss_at: Callable[[float], float], untouched: float
) -> tuple[float | None, dict[float, float]]:
    """Search the gamma with the smallest loss: the initialization's direction is given, its size is not.

    A pattern search over log(gamma) from 128: it moves by a factor of 4 to whichever side is better, and
    halves the exponent of the factor where neither is. Losses that are not finite count as infinite.

    Args:
        loss_at: Installs the factors with a gamma and returns the loss; called at most 8 times.
        untouched: Loss of the untouched model, gamma -> infinity.

    Returns:
        The best gamma, or None if none of those tried is better than the untouched model; and the loss at
        each gamma, in the order of the trials.
    """
    losses: dict[float, float] = {}  # by exponent of 2

    def at(exponent: float) -> float:
        if exponent not in losses:
            loss = loss_at(2**exponent)
            losses[exponent] = loss if math.isfinite(loss) else math.inf
        return losses[exponent]

    best, step = math.log2(FIRST_GAMMA), math.log2(FIRST_FACTOR)
    at(best)
    while len(losses) < MAX_TRIALS:
        for neighbour in (best - step, best + step):
            if len(losses) < MAX_TRIALS or neighbour in losses:
                at(neighbour)
        # Of equal losses, such as infinite ones, that of the larger gamma.
        better = min(losses, key=lambda exponent: (losses[exponent], -exponent))
        if better == best:
            step /= 2
        best = better
    tried = {2**exponent: loss for exponent, loss in losses.items()}
    return (2**best if losses[best] < untouched else None), tried
