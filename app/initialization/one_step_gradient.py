"""The one-step full gradient of every adapted layer, over a fixed set of samples."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from app.distributed.collectives import gather_numbers, sum_over_processes
from app.initialization.gradient_estimators import GradientEstimate
from app.initialization.gradient_exchange import Layer
from app.initialization.gradient_sketch import RandomColumns
from app.initialization.gradient_store import ExactStore, GradientStore, SketchStore
from app.initialization.observation import observed
from app.models.batch import IGNORED_LABEL, Batch
from app.models.lora import LoraPair
from app.models.loss import Weighting, summed_loss, supervised_logits
from app.utils.errors import InputError
from app.utils.memory import PeakMemory

MAX_PASSES = 4
ForwardContext = Callable[[], AbstractContextManager[None]]
Progress = Callable[[Sequence[Batch], str], Iterable[Batch]]


@dataclass(frozen=True)
class Estimator:
    """How the gradient is kept while it is observed.

    Args:
        kind: `sketch` keeps a low-rank form of (m + n) * (r + oversampling) numbers a layer and never a
            full gradient; `exact` keeps the whole sum, m * n numbers a layer; `signs`, too, and decomposes
            the sign of each entry, which is the first step of AdamW.
        passes: Passes of the sketch over the samples, 1 to 4; each makes it more exact. `auto` makes as many of
            them as the mean over layers of `rank_error` takes to fall to `tolerance`.
        tolerance: Largest such error, between 0 and 1.
        oversampling: Columns of the sketch beyond the rank.
        seed: Seed of the sketch's random first basis and probes.
    """

    kind: Literal["sketch", "exact", "signs"] = "sketch"
    passes: int | Literal["auto"] = "auto"
    tolerance: float = 0.02
    oversampling: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes != "auto" and not 1 <= self.passes <= MAX_PASSES:
            raise InputError(
                f"init.estimator.passes must lie in 1..{MAX_PASSES} or be auto, got {self.passes}"
            )
        if self.kind != "sketch" and self.passes not in (1, "auto"):
            raise InputError(
                f"init.estimator.kind is {self.kind}, which takes one pass, but init.estimator.passes is "
                f"{self.passes}: leave passes at auto or set kind to sketch"
            )
        if not 0 < self.tolerance < 1:
            raise InputError(
                f"init.estimator.tolerance must lie between 0 and 1, got {self.tolerance:g}"
            )
        if self.oversampling < 0:
            raise InputError(f"init.estimator.oversampling must be >= 0, got {self.oversampling}")

    @property
    def is_adaptive(self) -> bool:
        """Whether the error decides how many passes are made."""
        return self.kind == "sketch" and self.passes == "auto"

    @property
    def most_passes(self) -> int:
        """Passes after which the error is what it is."""
        if self.is_adaptive:
            return MAX_PASSES
        return 1 if self.passes == "auto" else self.passes


@dataclass(frozen=True)
class OneStepResult:
    """The observed gradients and what observing them took."""

    estimates: dict[str, GradientEstimate]  # by layer
    passes: int  # over the samples
    loss: float  # mean over the whole set, before any step
    tokens: int  # supervised ones in the set
    seconds: float  # wall time of all passes and decompositions
    peak_bytes: list[int]  # on each process: allocated on the accelerator, or resident on the CPU
    sent_bytes: list[int]  # by each process to others
    store: GradientStore  # what the estimates were made of: sums, `divisor` times the means
    divisor: int


def one_step_gradients(
    model: nn.Module,
    base: PreTrainedModel,
    pairs: Sequence[LoraPair],
    batches: Sequence[Batch],
    rank: int | Mapping[str, int],
    estimator: Estimator,
    forward_context: ForwardContext = nullcontext,
    progress: Progress = lambda batches, label: batches,
    weighting: Weighting = "tokens",
    train_mode: bool = False,
) -> OneStepResult:
    """Observe G = dL/dW of every pair's layer at the untouched base model.

        tokens: L = (sum of token losses over all batches) / (number of supervised tokens in all batches)
        rows:   L = (sum of the rows' mean token losses) / (number of rows)

    so G does not depend on how the set is cut into batches, nor on how these are spread over processes:
    each process passes its share, and all get the same result. The model runs without its adapters and
    frozen; weights, `.grad`, flags, mode and random state are left as they were.

    Args:
        model: The PEFT model that is called.
        base: The transformers model inside it.
        pairs: The layers to observe.
        batches: This process's share of the set on any device, as micro-batches; all processes have as many.
        rank: LoRA rank r, the triplets wanted of each gradient; by layer where they differ.
        estimator: How G is kept.
        forward_context: Makes the trainer's precision context, such as autocast.
        progress: Shows, under a label, how far the iteration over the batches is.
        weighting: Which mean L is.
        train_mode: Run in training mode. Dropout masks, the same in each pass, depend on the cut into batches.

    Returns:
        OneStepResult; its gradients are those of L.

    Raises:
        InputError: If a loss, a layer's gradient (names the batch and the layer) or its sum is not finite.
        RuntimeError: If a layer that is no expert was not reached by the backward pass, on any process.
    """
    device = pairs[0].lora_A.device
    ranks = rank if isinstance(rank, Mapping) else {pair.name: rank for pair in pairs}
    store = make_store(pairs, ranks, estimator, device)
    numbers, began = count_supervised(batches, device), time.perf_counter()
    divisor = numbers[weighting]
    run = partial(_run, model, base, store, device, forward_context, weighting, train_mode)
    with PeakMemory(device) as memory, observed(model, pairs, store.listener, train_mode):
        shown = _passes(batches, estimator, store, progress)
        losses, estimates = _estimate(run, shown, pairs, store, ranks, estimator, divisor)
    return OneStepResult(
        estimates=estimates,
        passes=len(losses),
        loss=losses[0],
        tokens=numbers["tokens"],
        seconds=time.perf_counter() - began,
        peak_bytes=gather_numbers(memory.peak_bytes, device),
        sent_bytes=gather_numbers(store.sent_bytes, device),
        store=store,
        divisor=divisor,
    )


def _passes(
    batches: Sequence[Batch], estimator: Estimator, store: GradientStore, progress: Progress
) -> Iterator[Iterable[Batch]]:
    """Yield the batches for each pass, as `progress` shows them."""
    most = estimator.most_passes
    of = f" of at most {most}" if estimator.is_adaptive else f"/{most}"
    for number in range(1, most + 1):
        if number > 1:
            store.next_pass()
        yield progress(batches, f"one-step gradient, pass {number}{of}")


def _estimate(
    run: Callable[[Iterable[Batch]], float],
    passes: Iterable[Iterable[Batch]],
    pairs: Sequence[LoraPair],
    store: GradientStore,
    ranks: Mapping[str, int],
    estimator: Estimator,
    divisor: int,
) -> tuple[list[float], dict[str, GradientEstimate]]:
    """Make passes until the estimates are exact enough; return the mean loss of each pass, and them."""
    losses: list[float] = []
    for batches in passes:
        estimates: dict[str, GradientEstimate] = {}  # those of the pass before are freed
        losses.append(run(batches) / divisor)
        _check_reached(store, pairs)
        if estimator.is_adaptive or len(losses) == estimator.most_passes:
            estimates = store.estimates(ranks, 1 / divisor)
            if mean_rank_error(estimates) <= estimator.tolerance:
                break
    return losses, estimates


def mean_rank_error(estimates: Mapping[str, GradientEstimate]) -> float:
    """Average the estimated errors of the layers' leading parts; of a gradient that is zero there is none."""
    errors = [estimate.rank_error for estimate in estimates.values() if estimate.norm > 0]
    return sum(errors) / max(len(errors), 1)


def count_supervised(batches: Sequence[Batch], device: torch.device) -> dict[Weighting, int]:
    """Count the supervised tokens in all processes' batches, and the rows that have any."""
    supervised = [batch["labels"] != IGNORED_LABEL for batch in batches]
    counts = torch.tensor(
        [sum(int(s.sum()) for s in supervised), sum(int(s.any(dim=1).sum()) for s in supervised)],
        device=device,
    )
    tokens, rows = sum_over_processes(counts).tolist()
    return {"tokens": tokens, "rows": rows}


def _check_reached(store: GradientStore, pairs: Sequence[LoraPair]) -> None:
    """Raise RuntimeError if the loss depends on a layer nowhere, unless no token was routed to it."""
    experts = {pair.name for pair in pairs if pair.is_expert}
    if unreached := [name for name in store.unreached() if name not in experts]:
        raise RuntimeError(
            f"the backward pass did not reach {len(unreached)} of {len(store.layers)} layers, first "
            f"{unreached[0]}. Activation checkpointing must be without re-entry (use_reentrant=False); a layer "
            "that the loss does not depend on has to leave model.adapter.target_modules"
        )


def _run(
    model: nn.Module,
    base: PreTrainedModel,
    store: GradientStore,
    device: torch.device,
    forward_context: ForwardContext,
    weighting: Weighting,
    train_mode: bool,
    batches: Iterable[Batch],
) -> float:
    """Run all micro-batches forward and backward; return the summed loss of all processes."""
    total, devices = 0.0, [] if device.type == "cpu" else [device]
    # Each pass draws the masks of dropout from the same state, which is left behind.
    with torch.random.fork_rng(devices, enabled=train_mode, device_type=device.type):
        for i, batch in enumerate(batches):
            moved = {key: value.to(device) for key, value in batch.items()}
            with torch.enable_grad(), forward_context():
                loss = summed_loss(supervised_logits(model, base, moved), weighting)
            # Summed over processes, so that all of them stop where one of them has to.
            whole = float(sum_over_processes(loss.detach().clone()))
            if not math.isfinite(whole):
                raise InputError(_not_finite("the loss", i, batch))
            # Outside the precision context, where autocast would round the sums to 16 bits.
            if loss.requires_grad:
                loss.backward()
            store.end_batch()
            if layer := store.pop_non_finite():
                raise InputError(_not_finite(f"the gradient at {layer}", i, batch))
            total += whole
        store.end_pass()
    return total


def make_store(
    pairs: Sequence[LoraPair],
    ranks: Mapping[str, int],
    estimator: Estimator,
    device: torch.device,
) -> GradientStore:
    """Make what keeps the gradients of the pairs' layers; the arguments are those of `one_step_gradients`."""
    layers = [Layer(pair.name, pair.lora_B.shape[0], pair.lora_A.shape[1]) for pair in pairs]
    if estimator.kind != "sketch":
        return ExactStore(layers, device, estimator.kind == "signs")
    widths = {name: rank + estimator.oversampling for name, rank in ranks.items()}
    return SketchStore(layers, widths, device, RandomColumns(device, estimator.seed))


def _not_finite(what: str, number: int, batch: Batch) -> str:
    rows = batch["index"].tolist() if "index" in batch else []
    return (
        f"{what} is not finite in micro-batch {number} of the initialization set (training rows {rows}): "
        "look at these rows, or use a wider precision (model.dtype float32, trainer.precision 32-true)"
    )
