"""What the starts of an adapter share: when they may run, what a resumed run knows, what they report."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from app.errors import InputError
from app.loss import Batch
from app.one_step import Estimator, OneStepResult


class Start(Callback):
    """Fills a new adapter when fitting starts, once; a resumed run has it already.

    Attributes:
        report: What the start was, for the run's record; empty before.
    """

    def __init__(self) -> None:
        self.report: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Remember that the start was installed, and what it was."""
        return {"report": self.report}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the report of the interrupted run; its adapters are not overwritten."""
        self.report = state_dict["report"]


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


def gradient_batches(trainer: Trainer, num_samples: int, micro_batch_size: int) -> Sequence[Batch]:
    """Return this process's share of the initialisation rows."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    found: Sequence[Batch] = data.gradient_batches(
        num_samples, micro_batch_size, trainer.global_rank, trainer.world_size
    )
    return found


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
    rank: int,
    without: list[str],
) -> dict[str, Any]:
    """Tell how the gradient was observed, and return it for the run's record.

    Args:
        title: The start's name.
        result: The gradients.
        estimator: How they were kept.
        num_samples: Rows they were taken over.
        rank: Triplets that the start uses.
        without: Layers whose gradient is zero.
    """
    energy = {name: e.captured_energy for name, e in result.estimates.items()}
    mean, lowest = sum(energy.values()) / len(energy), min(energy.values())
    errors = {name: e.rank_error for name, e in result.estimates.items()}
    worst = max(errors, key=errors.__getitem__)
    rank_zero_info(
        f"{title} start: {len(energy)} layers, {num_samples} samples, loss {result.loss:.4f}; "
        f"captured energy {mean:.1%} on average, {lowest:.1%} at least "
        f"({min(energy, key=energy.__getitem__)}); estimated error of the rank-{rank} part "
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
