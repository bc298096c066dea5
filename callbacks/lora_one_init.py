"""LoRA-One's initialization: one-step full gradient, spectral factors, installed before the first step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.initialization.factors import SVD, spectral_factors, unit_of
from app.initialization.gamma_search import GammaSearch, first_gamma, install_best, task_losses
from app.models.lora import LoraPair, install
from app.training.protocols import AdaptedModule, data_of
from app.utils.console import track
from callbacks.initialization import GradientInit, check_gamma

SHARE, FEWEST = 5, 6
"""Of how many samples one is a row whose task loss chooses `gamma: auto`; and how many these are at least."""


class LoraOneInit(GradientInit):
    """Initialize every LoRA pair with the best rank-r approximation of its negative one-step gradient.

        lora_B @ lora_A = P_r(-G) / (gamma * S_1(G)),    the base weight stays as it is

    so that the first forward pass already contains one normalised gradient step, of spectral norm
    scaling / gamma in every layer.

    Args:
        gamma: Divisor of the factors' product, 1e-6 to 1e12 (the authors' `stable_gamma`); larger is a smaller
            first step. `auto` tries three on a fifth of the samples and takes the one that lowers the task
            loss most surely (`app.initialization.gamma_search`): among the label words, where rows have
            classes. Where none does, training starts from the untouched model.
        scale: `layer` divides by each layer's own S_1, `global` by the largest S_1 of all layers: a gradient
            step with one step size.
        **gradient: See `GradientInit`.

    Source: arXiv:2502.01235, Algorithm 1. Differs, unless configs/paper.yaml is given: L is the mean over
    tokens (theirs over rows, in micro-batches of one), the model is in evaluation mode, and the samples are
    drawn by the seed (theirs are the first rows of the file).
    """

    def __init__(
        self,
        gamma: float | Literal["auto"] = 128.0,
        scale: Literal["layer", "global"] = "layer",
        **gradient: Any,
    ) -> None:
        super().__init__(**gradient)
        self.gamma = gamma if gamma == "auto" else check_gamma(gamma)
        self.scale = scale

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors; return how, for the run's record."""
        pairs = module.lora_pairs()
        ranks = {pair.name: pair.rank for pair in pairs}
        gradients, report = self.observe(trainer, module, self.batches(trainer), ranks, "LoRA-One")
        triplets = [
            (pair, SVD(*(part[..., : pair.rank] for part in gradients[pair.name])))
            for pair in pairs
            if pair.name in gradients
        ]
        unit = unit_of((svd for _, svd in triplets), self.scale)

        def install_step(gamma: float) -> None:
            for pair, svd in triplets:
                install(pair, *spectral_factors(svd, gamma, unit))

        if not triplets:
            return {**report, "gamma": None}
        if self.gamma != "auto":
            install_step(self.gamma)
            return {**report, "gamma": self.gamma}
        steps = [(pair.scaling, svd) for pair, svd in triplets]
        first = first_gamma(steps, unit, report["loss"])
        filled = [pair for pair, _ in triplets]
        search = self._search(trainer, module, filled, install_step, first)
        report["seconds"] += search["gamma_search"]["seconds"]
        return {**report, **search}

    def _search(
        self,
        trainer: Trainer,
        module: AdaptedModule,
        pairs: list[LoraPair],
        install_step: Callable[[float], None],
        first: float,
    ) -> dict[str, Any]:
        """Install the factors with the best gamma, or none; return what the run's record holds of it."""
        rows, labels = judging_rows(self.num_samples), data_of(trainer).label_token_ids()
        losses = partial(
            task_losses,
            module.model,
            module.base,
            self.batches(trainer, rows),
            labels,
            module.lora_pairs()[0].lora_A.device,
            trainer.precision_plugin.forward_context,
            self.weighting,
        )
        search = install_best(pairs, install_step, losses, first, track)
        measure = "loss among the label words" if labels else "loss"
        _say(search, measure, rows)
        trials = [
            {
                "gamma": gamma,
                **{
                    name: value if math.isfinite(value) else None
                    for name, value in trial._asdict().items()
                },
            }
            for gamma, trial in search.trials.items()
        ]
        found = {"measure": measure, "rows": rows, "untouched": search.untouched, "trials": trials}
        return {"gamma": search.gamma, "gamma_search": {**found, "seconds": search.seconds}}


def judging_rows(num_samples: int) -> int:
    """Return how many of the initialization samples choose gamma."""
    return min(num_samples, max(num_samples // SHARE, FEWEST))


def _say(search: GammaSearch, measure: str, rows: int) -> None:
    after = f"{len(search.trials)} trials on {rows} samples, {search.seconds:.1f} s"
    if search.gamma is None:
        tried = ", ".join(f"{gamma:g}" for gamma in search.trials)
        rank_zero_warn(
            f"no gamma that was tried ({tried}) lowers the {measure}, {search.untouched:.4f}, by more than "
            f"its standard error: training starts from the untouched model; {after}"
        )
    else:
        loss = search.trials[search.gamma].loss
        rank_zero_info(
            f"gamma {search.gamma:g}: {measure} {search.untouched:.4f} -> {loss:.4f}; {after}"
        )
