"""OLoRA's initialization: the weight's QR decomposition, its leading part subtracted from the base."""

from torch import Tensor

from app.initialization.weight_factors import olora_factors
from app.models.lora import LoraPair
from callbacks.initialization import WeightInit


class OloraInit(WeightInit):
    """Let the adapter train the leading part of the weight's QR decomposition, and freeze the rest.

        Q R = W,    lora_B = Q_:,1..r,    lora_A = R_1..r,:
        W <- W - scaling * lora_B @ lora_A

    so that the first forward pass computes what the untouched model does. W is rounded to its dtype, as by
    PissaInit.

    Source: arXiv:2406.01775; PEFT's `init_lora_weights="olora"`. Differs: the adapter is exported as the plain
    LoRA of rank 2r that belongs to the untouched base; a weight that is stored transposed (GPT-2's) is
    decomposed as (m, n), like all others.
    """

    title = "OLoRA"

    def factors(self, pair: LoraPair, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a pair's weight."""
        return olora_factors(W, pair.rank)
