"""LoRA-SB's initialization: the leading singular triplets of full fine-tuning's first AdamW step."""

from typing import Any, cast

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from app.initialization.factors import SVD, lora_sb_factors
from app.initialization.one_step_gradient import Estimator
from app.models.lora import install
from app.training.protocols import AdaptedModule
from callbacks.initialization import GradientInit


class LoraSbInit(GradientInit):
    """Initialize every LoRA pair with the best rank-r approximation of full fine-tuning's first AdamW step.

        U S V^T = SVD(-rate sign(G)),    scaling * lora_B = U diag(S),    lora_A = V^T

    rate is the first learning rate of the run's schedule that is not 0; the base weight stays as it is. The
    optimizer is to be LoraSbAdamW, which trains the matrix between U and V^T alone.

    Args:
        **gradient: See `GradientInit`; the estimator keeps the gradient's signs.

    Source: arXiv:2411.19557; repository CERT-Lab/lora-sb (`estimate_and_process_grads_torch`). Differs: L,
    the mode and the samples, as in LoraOneInit; the singular vectors are float32 (theirs are rounded to
    bfloat16).
    """

    @property
    def elsewhere(self) -> str:
        """Why another tool cannot train what this installs."""
        return "makes factors that LoraSbAdamW alone trains as they are meant to be"

    def __init__(self, **gradient: Any) -> None:
        super().__init__(estimator=Estimator("signs"), **gradient)

    def install_init(self, trainer: Trainer, module: AdaptedModule) -> dict[str, Any]:
        """Install the factors; return how, for the run's record."""
        pairs = module.lora_pairs()
        ranks = {pair.name: pair.rank for pair in pairs}
        signs, report = self.observe(trainer, module, self.batches(trainer), ranks, "LoRA-SB")
        rate = first_rate(trainer)
        for pair in pairs:
            if pair.name in signs:
                svd = SVD(*(part[..., : pair.rank] for part in signs[pair.name]))
                install(pair, *lora_sb_factors(svd, rate, pair.scaling))
        return {**report, "rate": rate}


def first_rate(trainer: Trainer) -> float:
    """Return the first learning rate that is not 0: warm-up begins with a step at rate 0."""
    [config] = trainer.lr_scheduler_configs
    scheduler = cast(LambdaLR, config.scheduler)  # from transformers' get_scheduler
    shape = scheduler.lr_lambdas[0]
    return float(scheduler.base_lrs[0] * max(shape(0), shape(1)))
