"""The base of the callbacks that initialize an adapter: when they may run, and what a resumed run knows."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from app.initialization.factors import SVD
from app.initialization.one_step_gradient import (
    Estimator,
    OneStepResult,
    mean_rank_error,
    one_step_gradients,
)
from app.models.batch import Batch
from app.models.lora import LoraPair, base_weight
from app.models.loss import Weighting
from app.models.quantization import quantized_by
from app.tracking.record import InitRecord
from app.training.checks import check_new_adapter, check_subtraction, check_untied
from app.training.protocols import AdaptedModule, adapted, data_of
from app.utils.console import track
from app.utils.errors import InputError

SMALLEST_GAMMA, LARGEST_GAMMA = 1e-6, 1e12
"""Beyond these the factors are lost in the rounding of the weights, or these in that of the factors."""


NAMED = 8
"""Layers that a warning names; the run's record has all of them."""


class AdapterInit(Callback):
    """Fill a new adapter when fitting starts, once; a resumed run has it already."""

    subtracts_from_base = False  # whether the product of the factors is

    @property
    def elsewhere(self) -> str:
        """Why another tool cannot train what this installs; empty where one can."""
        subtracts = "changes the base weights, too, but another tool loads them as they were"
        return subtracts if self.subtracts_from_base else ""

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}  # how the adapter was filled, for the run's record

    def state_dict(self) -> dict[str, Any]:
        """Remember that the adapter was filled, and how."""
        return {"report": self.report}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the report of the interrupted run; its adapter is not overwritten."""
        self.report = state_dict["report"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model's weights are loaded."""
        module, name = adapted(pl_module), type(self).__name__
        check_new_adapter(name, module.adapter, module.adapter_path)
        if self.subtracts_from_base:
            quantized = quantized_by(module.source, module.config)
            check_subtraction(name, module.name, quantized, module.is_sharded)

    def check_rank(self, model: nn.Module) -> None:
        """Refuse a rank for which a layer of an adapted model, which may have no weights, is too small."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and install the factors, unless a checkpoint has brought trained ones."""
        module = adapted(pl_module)
        if not self.report:
            if self.subtracts_from_base:
                check_untied(type(self).__name__, module.model)
            self.report = self.install_init(trainer, module)
        module.record.init = InitRecord(**self.report)

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Fill the module's adapter; return how, for the run's record."""
        raise NotImplementedError


class WeightInit(AdapterInit):
    """An initialization made of each layer's own weight, and subtracted from it."""

    subtracts_from_base = True
    title: str  # the method's name

    def factors(self, pair: LoraPair, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return lora_A (r, n) and lora_B (m, r) of a pair's weight W (m, n), float32, on its device."""
        raise NotImplementedError

    @torch.no_grad()
    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors and subtract their product from the base; return how, for the run's record."""
        began = time.perf_counter()
        factors = {
            pair.name: self.factors(pair, base_weight(pair).float())
            for pair in track(module.lora_pairs(), f"{self.title} factors of the weights")
        }
        module.install_and_subtract(factors)
        seconds = time.perf_counter() - began
        rank_zero_info(f"{self.title} initialization: {len(factors)} layers, {seconds:.1f} s")
        return {"seconds": seconds}


class GradientInit(AdapterInit):
    """An initialization made of the one-step gradient of the untouched model.

    Args:
        num_samples: Training rows that the gradient is taken over.
        micro_batch_size: Rows of one forward and backward pass; changes memory and speed.
        estimator: How the gradient is kept while it is observed.
        weighting: What the loss averages: `tokens`, or `rows`, each with its tokens' mean.
        samples: Which rows: `drawn` by the seed, or the `first` of the training rows, in the order of the file.
        train_mode: Observe the model in training mode, in which its own dropout acts.
    """

    def __init__(
        self,
        num_samples: int = 64,
        micro_batch_size: int = 8,
        estimator: Estimator = Estimator(),  # noqa: B008 (frozen)
        weighting: Weighting = "tokens",
        samples: Literal["drawn", "first"] = "drawn",
        train_mode: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("micro_batch_size", micro_batch_size)):
            if not value > 0:
                raise InputError(f"init.{name} must be > 0, got {value}")
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.estimator = estimator
        self.weighting: Weighting = weighting
        self.drawn = samples == "drawn"
        self.train_mode = train_mode
        # Leading triplets of each layer, once observed; None where no other callback wants them.
        self.kept: dict[str, SVD] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model's weights are loaded."""
        super().setup(trainer, pl_module, stage)
        self.batches(trainer)

    def batches(self, trainer: Trainer, num_rows: int | None = None) -> Sequence[Batch]:
        """Return this process's share of the initialization rows, or of so many of them."""
        place = trainer.global_rank, trainer.world_size
        return data_of(trainer).gradient_batches(
            num_rows or self.num_samples, self.micro_batch_size, *place, self.drawn
        )

    def observe(
        self,
        trainer: Trainer,
        module: AdaptedModule,
        batches: Sequence[Batch],
        ranks: Mapping[str, int],
        title: str,
    ) -> tuple[dict[str, SVD], dict[str, Any]]:
        """Take the one-step gradient of every layer; warn of those whose gradient is zero.

        Args:
            trainer: Its precision is that of the pass.
            module: Its model is observed.
            batches: From `batches`.
            ranks: Triplets that the initialization uses, by layer.
            title: The method's name.

        Returns:
            The leading triplets or more of each layer whose gradient is not zero: U (m, k), S (k,), V (n, k);
            and a report for the run's record.
        """
        result = one_step_gradients(
            module.model,
            module.base,
            module.lora_pairs(),
            batches,
            ranks,
            self.estimator,
            trainer.precision_plugin.forward_context,
            track,
            self.weighting,
            self.train_mode,
        )
        svds = {name: estimate.svd for name, estimate in result.estimates.items()}
        if self.kept is not None and self.estimator.kind != "signs":
            self.kept.update(svds)
        without = [name for name, svd in svds.items() if float(svd.S[0]) == 0]
        if without:
            routed = sum(pair.is_expert and pair.name in without for pair in module.lora_pairs())
            names = ", ".join(without[:NAMED]) + (", ..." if len(without) > NAMED else "")
            rank_zero_warn(
                f"the one-step gradient is zero in {len(without)} layers, which keep the usual LoRA "
                f"initialization ({routed} are experts that none of the {self.num_samples} samples was "
                f"routed to; more init.num_samples reach more): {names}"
            )
        rank = "/".join(map(str, sorted(set(ranks.values()))))
        report = self._report(result, title, rank)
        report["layers_without_gradient"] = without
        return {name: svd for name, svd in svds.items() if name not in without}, report

    def _report(self, result: OneStepResult, title: str, rank: str) -> dict[str, Any]:
        """Print how exactly the gradients are known and what that took; return it for the run's record."""
        # Of a gradient that is zero there is nothing to capture.
        known = {n: e for n, e in result.estimates.items() if e.norm > 0} or result.estimates
        energy = {name: e.captured_energy for name, e in known.items()}
        errors = {name: e.rank_error for name, e in known.items()}
        least, worst = min(energy, key=energy.__getitem__), max(errors, key=errors.__getitem__)
        mean_energy = sum(energy.values()) / len(energy)
        mean_error, tolerance = mean_rank_error(result.estimates), self.estimator.tolerance
        passes = f"{result.passes} pass" + ("es" if result.passes > 1 else "")
        if self.estimator.is_adaptive and mean_error <= tolerance:
            passes += f" to a tolerance of {tolerance:.3g}"
        rank_zero_info(
            f"{title} initialization: {len(energy)} layers, {self.num_samples} samples, {passes}, "
            f"loss {result.loss:.4f}; captured energy {mean_energy:.1%} on average, {energy[least]:.1%} at "
            f"least ({least}); estimated error of the rank-{rank} part {mean_error:.2%} on average, "
            f"{errors[worst]:.2%} at most ({worst}); {result.seconds:.1f} s"
        )
        if self.estimator.is_adaptive and mean_error > tolerance:
            rank_zero_warn(
                f"after {passes} the estimated error of the rank-{rank} part is {mean_error:.2%} on "
                f"average, above init.estimator.tolerance ({tolerance:.2%}): the gradients' singular values "
                "fall slowly. More init.estimator.oversampling lowers it"
            )
        return {
            "estimator": self.estimator.kind,
            "passes": result.passes,
            "tolerance": tolerance if self.estimator.is_adaptive else None,
            "oversampling": self.estimator.oversampling,
            "samples": self.num_samples,
            "tokens": result.tokens,
            "loss": result.loss,
            "seconds": result.seconds,
            "peak_bytes": result.peak_bytes,
            "sent_bytes": result.sent_bytes,
            "captured_energy": {"mean": mean_energy, "min": energy[least]},
            "rank_error": {"mean": mean_error, "max": errors[worst]},
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


def check_gamma(gamma: float, name: str = "gamma") -> float:
    """Return the divisor of an initialization; raise InputError if it is out of range."""
    if not SMALLEST_GAMMA <= gamma <= LARGEST_GAMMA:
        raise InputError(
            f"init.{name} must lie between {SMALLEST_GAMMA:g} and {LARGEST_GAMMA:g}, got {gamma:g}"
        )
    return gamma
