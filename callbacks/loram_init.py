"""LoRAM's initialization: the magnitude of a spectral one on a fixed basis, subtracted from the base."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.initialization.weight_factors import loram_factors, loram_magnitude
from app.models.lora import LoraPair, lora_pairs
from app.training.protocols import AdaptedModule, adapted
from app.utils.errors import InputError
from callbacks.initialization import WeightInit, check_gamma


class LoramInit(WeightInit):
    """Give every LoRA pair the size of a spectral initialization, and directions that know nothing.

        lora_B = beta Phi_m,    lora_A = beta Phi_n^T,    Phi: leading columns of the discrete sine transform
        scaling * beta^2 = (log_min(m, n)(r) / r)^(1/2) |W|_F,    or scaling / gamma
        W <- W - scaling * lora_B @ lora_A

    so that the first forward pass computes what the untouched model does. It is the control of a spectral
    initialization: what that gains beyond this one, it does not owe to the size of its factors.

    Args:
        gamma: null takes the size from the weight, that of PiSSA as the paper has it. A number, 1e-6 to 1e12,
            takes that of LoraOneInit with this gamma: a product of spectral norm scaling / gamma in each layer.

    Source: arXiv:2507.06558, Algorithm 1, eqs. 11 and 12; `gamma` is its "tracking mode" for LoRA-One, whose
    leading singular value all r have here. Differs: the paper writes scaling 1, and the factors are divided by
    its root as PiSSA's are, so that the subtracted part is the paper's at any scaling; the adapter is exported
    as the plain LoRA of rank 2r that belongs to the untouched base.
    """

    title = "LoRAM"

    def __init__(self, gamma: float | None = None) -> None:
        super().__init__()
        self.gamma = None if gamma is None else check_gamma(gamma)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse rank 1, whose logarithm is 0, before weights are loaded."""
        super().setup(trainer, pl_module, stage)
        for pair in lora_pairs(adapted(pl_module).blueprint):
            if self.gamma is None and pair.rank == 1:
                raise InputError(
                    f"init is LoramInit, whose factors are 0 at rank 1, which {pair.name} has: set "
                    "model.adapter.r to at least 2, or give the size as init.gamma"
                )

    def factors(self, pair: LoraPair, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a pair's weight."""
        if self.gamma is None:
            magnitude = loram_magnitude(W, pair.rank) / pair.scaling
        else:
            magnitude = 1 / self.gamma
        m, n = W.shape
        lora_A, lora_B = loram_factors(m, n, pair.rank, magnitude)
        return lora_A.to(W.device), lora_B.to(W.device)

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors and subtract their product from the base; return how, for the run's record."""
        return {"gamma": self.gamma, **super().install_init(trainer, module)}
