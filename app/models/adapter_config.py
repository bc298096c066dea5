"""The settings of an adapter, which are PEFT's own, and PEFT's configuration made of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft import AdaLoraConfig, LoraConfig

from app.utils.errors import InputError

# Stands for the length of training, which PEFT's AdaLoraConfig requires before there is a trainer.
UNKNOWN_STEPS = 10**9


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
        for name, holds, expected in (
            ("init_r", self.init_r >= 1, "be at least 1"),
            ("tinit", self.tinit >= 0, "be at least 0"),
            ("tfinal", self.tfinal >= 0, "be at least 0"),
            ("deltaT", self.deltaT >= 1, "be at least 1"),
            ("beta1", 0 < self.beta1 < 1, "lie in (0, 1)"),
            ("beta2", 0 < self.beta2 < 1, "lie in (0, 1)"),
            ("orth_reg_weight", self.orth_reg_weight >= 0, "be >= 0"),
        ):
            if not holds:
                raise InputError(
                    f"model.adapter.adalora.{name} must {expected}, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter, in PEFT's names and with PEFT's meaning; the defaults are LoRA-One's.

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
        target_parameters: Parameters without a linear layer that are adapted too, a list of name endings such
            as [mlp.experts.down_proj]: fused experts that `all-linear` does not find.
        exclude_modules: Targets that are left out: a regular expression, or a list of name endings.
        layers_to_transform: Number of the block, or of the blocks, that are adapted; null adapts all. Needs
            a list of target_modules.
        layers_pattern: Name of the list of blocks, such as `layers`, where PEFT does not find it.
        rank_pattern: Rank of layers by name ending or regular expression, such as {k_proj: 4}, instead of r.
        alpha_pattern: Numerator of their scaling, likewise, instead of lora_alpha.
    """

    r: int = 8
    lora_alpha: float = 16
    use_rslora: bool = True
    lora_dropout: float = 0.0
    use_dora: bool = False
    adalora: AdaLoraBudget | None = None
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("r", self.r >= 1, "be at least 1"),
            ("lora_alpha", self.lora_alpha > 0, "be > 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "lie in [0, 1)"),
            ("rank_pattern", all(r >= 1 for r in self.rank_pattern.values()), "hold ranks >= 1"),
            ("alpha_pattern", all(a > 0 for a in self.alpha_pattern.values()), "hold numbers > 0"),
        ):
            if not holds:
                raise InputError(f"model.adapter.{name} must {expected}, got {getattr(self, name)}")
        self._check_parameters()
        if self.adalora is not None:
            self._check_adalora(self.adalora)
        try:
            self.peft_config()
        except ValueError as error:
            raise InputError(f"model.adapter cannot be used: {str(error).strip()}") from error

    def _check_parameters(self) -> None:
        """PEFT adds lora_B @ lora_A to a parameter, whatever its input is."""
        for name, off in (("lora_dropout", 0.0), ("use_dora", False)):
            if self.target_parameters and getattr(self, name) != off:
                raise InputError(
                    f"model.adapter has {name}: {getattr(self, name)}, which does not work with "
                    f"target_parameters: set {name} to {off}, or target_parameters to null"
                )

    def _check_adalora(self, budget: AdaLoraBudget) -> None:
        own = {
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_dora": False,
            "target_parameters": None,
        }
        for name in (name for name, off in own.items() if getattr(self, name) != off):
            raise InputError(
                f"model.adapter has {name}: {getattr(self, name)} and adalora, which exclude each other: "
                f"set {name} to {own[name]} or adalora to null"
            )
        if budget.init_r < self.r:
            raise InputError(
                f"model.adapter.adalora.init_r is {budget.init_r}, below the budget model.adapter.r "
                f"{self.r} to which it is pruned: set it to at least {self.r}"
            )

    def peft_config(self, **of_the_model: Any) -> LoraConfig:
        """Return PEFT's configuration, or raise its ValueError for a combination that it does not allow.

        Arguments are those that depend on the model: `task_type`, `fan_in_fan_out`.
        """
        settings = {**asdict(self), **of_the_model}
        budget = settings.pop("adalora")
        if budget is None:
            return LoraConfig(**settings)
        for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
            del settings[name]
        target_r = settings.pop("r")
        return AdaLoraConfig(**settings, **budget, target_r=target_r, total_step=UNKNOWN_STEPS)


def fsdp_incompatible_options(config: LoraConfig) -> list[str]:
    """Name the settings that do not work where the base weights are sharded."""
    options = {"use_dora": config.use_dora, "adalora": isinstance(config, AdaLoraConfig)}
    return [name for name, on in options.items() if on]


_INSTEAD = {
    "init_lora_weights": "set init (LoraOneInit, LoraGaInit, PissaInit, OloraInit), or neither for PEFT's own",
    "modules_to_save": "train every weight with adapter: null, or leave it out",
    "target_r": "the budget is model.adapter.r",
    "total_step": "it is the length of training",
    "fan_in_fan_out": "it follows from the model",
    "task_type": "it follows from the model",
}


def unsupported_settings() -> Mapping[str, str]:
    """Return what to do instead of each of PEFT's settings that cannot be had here, by its name."""
    ours = {field.name for kind in (LoraSettings, AdaLoraBudget) for field in fields(kind)}
    theirs = {field.name for kind in (LoraConfig, AdaLoraConfig) for field in fields(kind)}
    return {name: _INSTEAD.get(name, "leave it out") for name in theirs - ours}
