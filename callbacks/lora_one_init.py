"""LoRA-One's start: one-step full gradient, spectral factors, installed before the first step."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.adapters import LoraPair, install
from app.errors import InputError
from app.line_search import MOST, mean_loss, search_gamma
from app.loss import Batch
from app.one_step import Estimator, OneStepResult, one_step_gradients
from app.progress import track
from app.spectral_init import SVD, spectral_factors

Start = list[tuple[LoraPair, SVD]]
"""The pairs that get a start, with the leading r triplets of their gradients."""


class LoraOneInit(Callback):
    """Start every LoRA pair from the best rank-r approximation of its negative one-step gradient.

        lora_B @ lora_A = P_r(-G) / (gamma * S_1(G)),    the base weight stays as it is

    so that the first forward pass already contains one normalised gradient step, of spectral norm
    scaling / gamma in every layer.

    Args:
        gamma: Divisor of the start, > 0 (the authors' `stable_gamma`); larger means a smaller first step.
            `auto` searches the one with the smallest loss on the same samples, at most 8 forward passes
            over them (`app.line_search`), and is never worse there than the untouched model.
        num_samples: Training rows that the gradient is taken over.
        micro_batch_size: Rows of one forward and backward pass; changes memory and speed. The exact
            estimator's result does not depend on it, the sketch's only within its error.
        estimator: How the gradient is kept while it is observed.

    Source: arXiv:2502.01235, Algorithm 1. Differs: L is the token mean over all samples (the authors
    average the means of micro-batches), the model is in evaluation mode, and the samples are drawn by
    seed (theirs are the first rows of the file).
    """

    observes_gradient = True

    def __init__(
        self,
        gamma: float | Literal["auto"] = 128.0,
        num_samples: int = 64,
        micro_batch_size: int = 8,
        estimator: Estimator = Estimator(),  # noqa: B008 (frozen)
    ) -> None:
        for name, value in (
            ("gamma", 1 if gamma == "auto" else gamma),
            ("num_samples", num_samples),
            ("micro_batch_size", micro_batch_size),
        ):
            if not value > 0:
                raise InputError(f"init.{name} must be > 0, got {value}")
        self.gamma = gamma
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.estimator = estimator
        self.report: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Remember that the start was installed, and what it was."""
        return {"report": self.report}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the report of the interrupted run; its adapters are not overwritten."""
        self.report = state_dict["report"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model's weights are loaded."""
        module: Any = pl_module
        if module.adapter_path is not None:
            raise InputError(
                f"init is LoraOneInit, which would overwrite the adapter in model.adapter_path "
                f"{module.adapter_path!r}: set init to null to train it further"
            )
        if module.adapter is None:
            raise InputError(
                "init is LoraOneInit, but the model has no LoRA adapter: set model.adapter, or init to "
                "null for full fine-tuning"
            )
        self._batches(trainer)

    def _batches(self, trainer: Trainer) -> Any:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return data.gradient_batches(
            self.num_samples, self.micro_batch_size, trainer.global_rank, trainer.world_size
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and install the start, unless a checkpoint has brought trained adapters."""
        module: Any = pl_module
        if not self.report:
            pairs = module.lora_pairs()
            batches = self._batches(trainer)
            rank = pairs[0].lora_A.shape[0]
            result = one_step_gradients(
                module.model,
                module.base,
                pairs,
                batches,
                rank,
                self.estimator,
                trainer.precision_plugin.forward_context,
                track,
            )
            if module.one_step is not None:
                module.one_step.update({name: e.svd for name, e in result.estimates.items()})
            without = [name for name, e in result.estimates.items() if float(e.svd.S[0]) == 0]
            if without:
                rank_zero_warn(
                    f"the one-step gradient is zero in {len(without)} layers, which keep the usual LoRA "
                    f"start: {', '.join(without)}"
                )
            start = [
                (pair, SVD(*(part[..., :rank] for part in result.estimates[pair.name].svd)))
                for pair in pairs
                if pair.name not in without
            ]
            gamma: dict[str, Any] = {"gamma": self.gamma}
            if self.gamma == "auto":
                gamma = self._search(start, result.loss, module, batches, trainer)
            else:
                _install(start, self.gamma)
            self.report = {**self._report(result, without, rank), **gamma}
        module.record.init = self.report

    def _search(
        self,
        start: Start,
        untouched: float,
        module: Any,
        batches: Sequence[Batch],
        trainer: Trainer,
    ) -> dict[str, Any]:
        """Install the start with the best gamma, or none; return what was found."""
        usual = [
            (pair, pair.lora_A.detach().clone(), pair.lora_B.detach().clone()) for pair, _ in start
        ]
        context = trainer.precision_plugin.forward_context
        began = time.perf_counter()
        trials = iter(track(range(MOST), "search of gamma"))

        def loss_at(gamma: float) -> float:
            next(trials)
            _install(start, gamma)
            return mean_loss(module.model, module.base, batches, module.device, context)

        gamma, tried = search_gamma(loss_at, untouched)
        next(trials, None)  # ends the progress
        if gamma is None:
            for pair, lora_A, lora_B in usual:
                install(pair, lora_A, lora_B)
            rank_zero_warn(
                f"none of the starts tried (gamma {', '.join(f'{g:g}' for g in tried)}) lowers the loss of "
                f"{untouched:.4f} on the initialisation samples: training starts from the untouched model"
            )
        else:
            _install(start, gamma)
            rank_zero_info(
                f"gamma {gamma:g}: loss {untouched:.4f} -> {tried[gamma]:.4f} on the initialisation samples, "
                f"best of {len(tried)}; {time.perf_counter() - began:.1f} s"
            )
        return {"gamma": gamma, "gamma_search": [{"gamma": g, "loss": v} for g, v in tried.items()]}

    def _report(self, result: OneStepResult, without: list[str], rank: int) -> dict[str, Any]:
        energy = {name: e.captured_energy for name, e in result.estimates.items()}
        mean, lowest = sum(energy.values()) / len(energy), min(energy.values())
        errors = {name: e.rank_error for name, e in result.estimates.items()}
        worst = max(errors, key=errors.__getitem__)
        rank_zero_info(
            f"LoRA-One start: {len(energy)} layers, {self.num_samples} samples, loss {result.loss:.4f}; "
            f"captured energy {mean:.1%} on average, {lowest:.1%} at least "
            f"({min(energy, key=energy.__getitem__)}); estimated error of the rank-{rank} part "
            f"{sum(errors.values()) / len(errors):.2%} on average, {errors[worst]:.2%} at most ({worst}); "
            f"{result.seconds:.1f} s"
        )
        return {
            "estimator": self.estimator.kind,
            "passes": self.estimator.passes,
            "oversampling": self.estimator.oversampling,
            "samples": self.num_samples,
            "tokens": result.tokens,
            "loss": result.loss,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "sent_bytes": result.sent_bytes,
            "captured_energy": {"mean": mean, "min": lowest},
            "rank_error": {"mean": sum(errors.values()) / len(errors), "max": errors[worst]},
            "layers_without_gradient": without,
            "layers": {
                name: {
                    "captured_energy": e.captured_energy,
                    "rank_error": e.rank_error,
                    "norm": e.norm,
                    "singular_values": e.svd.S.tolist(),
                }
                for name, e in result.estimates.items()
            },
        }


def _install(start: Start, gamma: float) -> None:
    for pair, svd in start:
        factors = spectral_factors(svd, gamma)
        install(pair, factors.lora_A, factors.lora_B)
