"""LoRA-One's initialization: one-step full gradient, spectral factors, installed before the first step."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.initialization.factors import SVD, spectral_factors
from app.initialization.gamma_search import MAX_TRIALS, mean_loss, search_gamma
from app.models.lora import LoraPair, install
from app.training.protocols import AdaptedModule
from app.utils.console import track
from callbacks.initialization import GradientInit, check_gamma

Triplets = list[tuple[LoraPair, SVD]]
"""The pairs to fill, with the leading r triplets of their gradients."""


class LoraOneInit(GradientInit):
    """Initialize every LoRA pair with the best rank-r approximation of its negative one-step gradient.

        lora_B @ lora_A = P_r(-G) / (gamma * S_1(G)),    the base weight stays as it is

    so that the first forward pass already contains one normalised gradient step, of spectral norm
    scaling / gamma in every layer.

    Args:
        gamma: Divisor of the factors' product, 1e-6 to 1e12 (the authors' `stable_gamma`); larger is a smaller
            first step. `auto` searches the one with the smallest loss on the same samples, at most 8 forward
            passes over them (`app.initialization.gamma_search`), and is never worse there than the untouched
            model.
        **gradient: See `GradientInit`.

    Source: arXiv:2502.01235, Algorithm 1. Differs, unless configs/paper.yaml is given: L is the mean over
    tokens (theirs over rows, in micro-batches of one), the model is in evaluation mode, and the samples are
    drawn by the seed (theirs are the first rows of the file).
    """

    def __init__(self, gamma: float | Literal["auto"] = 128.0, **gradient: Any) -> None:
        super().__init__(**gradient)
        self.gamma = gamma if gamma == "auto" else check_gamma(gamma)

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors; return how, for the run's record."""
        pairs, batches = module.lora_pairs(), self.batches(trainer)
        ranks = {pair.name: pair.rank for pair in pairs}
        gradients, report = self.observe(trainer, module, batches, ranks, "LoRA-One")
        triplets = [
            (pair, SVD(*(part[..., : pair.rank] for part in gradients[pair.name])))
            for pair in pairs
            if pair.name in gradients
        ]
        if self.gamma != "auto":
            _install(triplets, self.gamma)
            return {**report, "gamma": self.gamma}
        loss_at = partial(
            mean_loss,
            module.model,
            module.base,
            batches,
            pairs[0].lora_A.device,
            trainer.precision_plugin.forward_context,
            self.weighting,
        )
        # Without dropout, as in the trials; the product of the new factors is still zero.
        untouched = loss_at() if self.train_mode else report["loss"]
        return {**report, **_install_best(triplets, untouched, loss_at)}


def _install(triplets: Triplets, gamma: float) -> None:
    for pair, svd in triplets:
        install(pair, *spectral_factors(svd, gamma))


def _install_best(
    triplets: Triplets, untouched: float, loss: Callable[[], float]
) -> dict[str, Any]:
    """Install the factors with the best gamma, or PEFT's again; return what the search came to.

    Args:
        triplets: Pairs and their gradients.
        untouched: Loss of the untouched model.
        loss: Returns the loss with the factors that are installed.
    """
    usual = [
        (pair, pair.lora_A.detach().clone(), pair.lora_B.detach().clone()) for pair, _ in triplets
    ]
    began = time.perf_counter()
    trials = iter(track(range(MAX_TRIALS), "search of gamma"))

    def loss_at(gamma: float) -> float:
        next(trials)
        _install(triplets, gamma)
        return loss()

    gamma, tried = search_gamma(loss_at, untouched)
    next(trials, None)  # ends the progress
    if gamma is None:
        for pair, lora_A, lora_B in usual:
            install(pair, lora_A, lora_B)
        rank_zero_warn(
            f"no gamma that was tried ({', '.join(f'{g:g}' for g in tried)}) lowers the loss of "
            f"{untouched:.4f} on the initialization samples: training starts from the untouched model"
        )
    else:
        _install(triplets, gamma)
        rank_zero_info(
            f"gamma {gamma:g}: loss {untouched:.4f} -> {tried[gamma]:.4f} on the initialization samples, "
            f"best of {len(tried)}; {time.perf_counter() - began:.1f} s"
        )
    return {"gamma": gamma, "gamma_search": [{"gamma": g, "loss": v} for g, v in tried.items()]}
