"""PiSSA's initialization: the weight's own leading singular triplets, subtracted from the base."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from app.initialization.weight_factors import pissa_factors
from app.models.lora import LoraPair
from app.training.protocols import AdaptedModule
from app.utils.errors import InputError
from callbacks.initialization import WeightInit


class PissaInit(WeightInit):
    """Let the adapter train the weight's principal part, and freeze the rest.

        U S V^T = SVD(W)
        lora_B = U_r (S_r / scaling)^(1/2),    lora_A = (S_r / scaling)^(1/2) V_r^T
        W <- W - scaling * lora_B @ lora_A

    so that the first forward pass computes what the untouched model does. W is rounded to its dtype: on a
    bfloat16 base the logits differ by about 5e-3 of their size.

    Args:
        niter: Power iterations of a randomised SVD; null takes the exact one, which is slow for large weights
            (PEFT's `pissa_niter_16` is 16).

    Source: arXiv:2404.02948; PEFT's `init_lora_weights="pissa"`. Differs: the adapter is exported as the plain
    LoRA of rank 2r that belongs to the untouched base.
    """

    title = "PiSSA"

    def __init__(self, niter: int | None = None) -> None:
        super().__init__()
        if niter is not None and niter < 1:
            raise InputError(
                f"init.niter must be at least 1, or null for the exact SVD, got {niter}"
            )
        self.niter = niter

    def factors(self, pair: LoraPair, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a pair's weight."""
        return pissa_factors(W, pair.rank, pair.scaling, self.niter)

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors and subtract their product from the base; return how, for the run's record."""
        return {"niter": self.niter, **super().install_init(trainer, module)}
