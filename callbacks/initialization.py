"""What the starts of an adapter share: when they may run, what a resumed run knows, what they report."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.initialization.one_step_gradient import Estimator, OneStepResult, one_step_gradients
from app.models.batch import Batch
from app.tracking.record import InitRecord
from app.utils.console import track
from app.utils.errors import InputError

SMALLEST_GAMMA, LARGEST_GAMMA = 1e-6, 1e12
"""Beyond these the start is lost in the rounding of the weights, or they are lost in its own."""


class AdapterInit(Callback):
    """Fills a new adapter when fitting starts, once; a resumed run has it already.

    Attributes:
        subtracts_from_base: Whether the start is taken off the base weights.
        report: What the start was, for the run's record; empty before.
    """

    subtracts_from_base = False

    def __init__(self) -> None:
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
        check_new_adapter(module, type(self).__name__)
        if self.subtracts_from_base:
            module.check_subtraction(type(self).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and install the start, unless a checkpoint has brought trained adapters."""
        module: Any = pl_module
        if not self.report:
            if self.subtracts_from_base:
                module.check_untied(type(self).__name__)
            self.report = self.install_init(trainer, module)
        module.record.init = InitRecord.from_json(self.report)

    def install_init(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        """Fill the module's adapter; return what the start was."""
        raise NotImplementedError


class GradientInit(AdapterInit):
    """A start made of the one-step gradient of the untouched model.

    Args:
        num_samples: Training rows that the gradient is taken over.
        micro_batch_size: Rows of one forward and backward pass.
        estimator: How the gradient is kept while it is observed.
    """

    def __init__(self, num_samples: int, micro_batch_size: int, estimator: Estimator) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("micro_batch_size", micro_batch_size)):
            if not value > 0:
                raise InputError(f"init.{name} must be > 0, got {value}")
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.estimator = estimator

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the model's weights are loaded."""
        super().setup(trainer, pl_module, stage)
        self.batches(trainer)

    def batches(self, trainer: Trainer) -> Sequence[Batch]:
        """Return this process's share of the initialisation rows."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found: Sequence[Batch] = data.gradient_batches(
            self.num_samples, self.micro_batch_size, trainer.global_rank, trainer.world_size
        )
        return found

    def observe(
        self,
        trainer: Trainer,
        module: Any,
        batches: Sequence[Batch],
        ranks: Mapping[str, int],
        title: str,
    ) -> tuple[OneStepResult, list[str], dict[str, Any]]:
        """Take the one-step gradient of every layer, and tell how it was observed.

        Args:
            trainer: Its precision is that of the pass.
            module: The LoraModule; its `one_step` gets the triplets, where a callback wants them.
            batches: From `batches`.
            ranks: Triplets that the initialization uses, by layer.
            title: The start's name.

        Returns:
            The gradients, the names of the layers whose gradient is zero, and a report for the run's record.
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
        )
        if module.one_step is not None:
            module.one_step.update({name: e.svd for name, e in result.estimates.items()})
        without = layers_without_gradient(result)
        told = report(title, result, self.estimator, self.num_samples, ranks, without)
        return result, without, told


def check_gamma(gamma: float) -> float:
    """Return the divisor of a start; raise InputError if it is out of range."""
    if not SMALLEST_GAMMA <= gamma <= LARGEST_GAMMA:
        raise InputError(
            f"init.gamma must lie between {SMALLEST_GAMMA:g} and {LARGEST_GAMMA:g}, got {gamma:g}"
        )
    return gamma


def check_new_adapter(module: Any, start: str) -> None:
    """Raise InputError unless the run begins with a new adapter, for a start to fill."""
    if module.adapter_path is not None:
        raise InputError(
            f"init is {start}, which would overwrite the adapter in model.adapter_path "
            f"{module.adapter_path!r}: set init to null to train it further"
        )
    if module.adapter is None:
        raise InputError(
            f"init is {start}, but the model has no LoRA adapter: set model.adapter, or init to "
            "null for full fine-tuning"
        )
    if module.adapter.adalora is not None:
        raise InputError(
            f"init is {start}, which fills lora_A and lora_B, but model.adapter.adalora is set, whose triplets "
            "start by themselves: set init or model.adapter.adalora to null"
        )


def layers_without_gradient(result: OneStepResult) -> list[str]:
    """Name the layers whose gradient is zero, with a warning: they keep the usual start."""
    without = [name for name, e in result.estimates.items() if float(e.svd.S[0]) == 0]
    if without:
        rank_zero_warn(
            f"the one-step gradient is zero in {len(without)} layers, which keep the usual LoRA "
            f"start: {', '.join(without)}"
        )
    return without


def report(
    title: str,
    result: OneStepResult,
    estimator: Estimator,
    num_samples: int,
    ranks: Mapping[str, int],
    without: list[str],
) -> dict[str, Any]:
    """Tell how the gradient was observed, and return it for the run's record.

    Args:
        title: The start's name.
        result: The gradients.
        estimator: How they were kept.
        num_samples: Rows they were taken over.
        ranks: Triplets that the initialization uses, by layer.
        without: Layers whose gradient is zero.
    """
    energy = {name: e.captured_energy for name, e in result.estimates.items()}
    mean, lowest = sum(energy.values()) / len(energy), min(energy.values())
    errors = {name: e.rank_error for name, e in result.estimates.items()}
    rank_text = "/".join(map(str, sorted(set(ranks.values()))))
    worst = max(errors, key=errors.__getitem__)
    rank_zero_info(
        f"{title} start: {len(energy)} layers, {num_samples} samples, loss {result.loss:.4f}; "
        f"captured energy {mean:.1%} on average, {lowest:.1%} at least "
        f"({min(energy, key=energy.__getitem__)}); estimated error of the rank-{rank_text} part "
        f"{sum(errors.values()) / len(errors):.2%} on average, {errors[worst]:.2%} at most ({worst}); "
        f"{result.seconds:.1f} s"
    )
    return {
        "estimator": estimator.kind,
        "passes": estimator.passes,
        "oversampling": estimator.oversampling,
        "samples": num_samples,
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
