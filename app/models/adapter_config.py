"""What a configuration says of the adapter, in PEFT's names."""

from dataclasses import dataclass

from app.utils.errors import InputError


@dataclass(frozen=True)
class AdaLoraBudget:
    """How AdaLoRA prunes, in PEFT's names; the budget that is left, PEFT's target_r, is the adapter's r.

    Args:
        init_r: Triplets of each layer in the beginning.
        tinit: Optimizer steps before the first pruning.
        tfinal: Optimizer steps at the end that keep the budget.
        deltaT: Optimizer steps between two prunings.
        beta1: Decay rate of the mean sensitivity.
        beta2: Decay rate of the mean uncertainty.
        orth_reg_weight: Weight of the orthogonality of lora_A and lora_B in the loss.
    """

    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("init_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"model.adapter.adalora.{name} must be at least {least}, got {getattr(self, name)}"
                )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"model.adapter.adalora.{name} must lie in (0, 1), got {getattr(self, name)}"
                )
        if self.orth_reg_weight < 0:
            raise InputError(
                f"model.adapter.adalora.orth_reg_weight must be >= 0, got {self.orth_reg_weight}"
            )


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter, in PEFT's names.

    Args:
        r: Rank of the update, 1 <= r <= the smaller side of every target.
        lora_alpha: Numerator of the scaling; dimensionless.
        use_rslora: Scale by lora_alpha / sqrt(r) (rank-stabilised) instead of lora_alpha / r.
        lora_dropout: Dropout on the adapter's input while training, in [0, 1).
        use_dora: DoRA: a trainable magnitude for each output, beside the direction that the factors change.
        adalora: AdaLoRA, which spreads a budget of r triplets a layer over the layers; null for LoRA. Its
            scaling is lora_alpha over the rank, whatever use_rslora.
        target_modules: `all-linear` (every linear layer but the LM head), a regular expression over
            module names, or a list of name endings such as [q_proj, v_proj].
    """

    r: int = 8
    lora_alpha: float = 16
    use_rslora: bool = True
    lora_dropout: float = 0.0
    use_dora: bool = False
    adalora: AdaLoraBudget | None = None
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"model.adapter.r must be at least 1, got {self.r}")
        if not self.lora_alpha > 0:
            raise InputError(f"model.adapter.lora_alpha must be > 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"model.adapter.lora_dropout must lie in [0, 1), got {self.lora_dropout}"
            )
        if self.adalora is not None and self.use_dora:
            raise InputError(
                "model.adapter has use_dora: true and adalora, which exclude each other: set use_dora to "
                "false or adalora to null"
            )
        if self.adalora is not None and self.adalora.init_r < self.r:
            raise InputError(
                f"model.adapter.adalora.init_r is {self.adalora.init_r}, below the budget model.adapter.r "
                f"{self.r} to which it is pruned: set it to at least {self.r}"
            )

    def fsdp_incompatible_options(self) -> list[str]:
        """Name the settings that do not work where the base weights are sharded."""
        settings = {"use_dora": self.use_dora, "adalora": self.adalora is not None}
        return [name for name, on in settings.items() if on]
