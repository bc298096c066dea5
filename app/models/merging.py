"""Merge an adapter into its base model in float32, and measure what rounding leaves of the update."""

from dataclasses import dataclass, field
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.models.lora import adapted_layers, tied_target_layers
from app.models.quantization import round_parameters
from app.utils.errors import InputError


@dataclass
class SurvivedShares:
    """The share of each weight's update that is left once the weight is rounded, by the weight's name."""

    shares: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, base: Tensor, merged: Tensor, written: Tensor) -> None:
        """Add a weight; one that was not updated has no share."""
        if not torch.equal(base, merged):
            self.shares[name] = survived_share(base, merged, written)

    @property
    def mean(self) -> float:
        """The mean over the weights, each counted once."""
        return sum(self.shares.values()) / len(self.shares)

    @property
    def worst(self) -> str:
        """The name of the weight with the least share."""
        return min(self.shares, key=self.shares.__getitem__)


def survived_share(base: Tensor, merged: Tensor, written: Tensor) -> float:
    """Compute the share of an update that is left of it in the rounded weight.

        share = <W_written - W, Delta W> / <Delta W, Delta W>,    Delta W = W_merged - W

    Entries of Delta W below half a unit in the last place of W vanish where W has the type that is written.
    Then the share is 1 only if the rounding errors have no part along the update.

    Args:
        base: W, any shape, float32.
        merged: W + Delta W, float32.
        written: The same, rounded to any dtype.

    Returns:
        The share, dimensionless; summed in float64.
    """
    base, update = base.double(), merged.double() - base.double()
    return float(((written.double() - base) * update).sum() / update.square().sum())


def check_mergeable(model: PeftModel) -> None:
    """Raise InputError if a weight is another module's too, which a merge would change with it.

    The model may be on the meta device.
    """
    for tied, other in tied_target_layers(model).items():
        raise InputError(
            f"merging would change the weight of {tied}, which is that of {other} too "
            "(tie_word_embeddings): export the adapter without --merge, or train with "
            f"{tied} left out of model.adapter.target_modules"
        )


@torch.no_grad()
def merge_adapter(
    model: PeftModel, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, SurvivedShares]:
    """Add every layer's update to its weight in float32, and round all weights to a dtype, once.

    Args:
        model: A PEFT model with a float32 base, which is used up.
        dtype: Of the model's parameters.

    Returns:
        The plain model, and the share of each layer's update that the rounding leaves.

    Raises:
        InputError: If a weight is another module's too, which the merge would change with it, or is not finite.
    """
    check_mergeable(model)
    survived = SurvivedShares()
    for name, layer in adapted_layers(model):
        weight = _adapted_weight(layer)
        base = weight.detach().clone()
        try:
            layer.merge(safe_merge=True)  # type: ignore[operator]  # of each of its subclasses
        except ValueError as error:
            raise InputError(f"{name} cannot be merged: {error}") from error
        survived.add(name, base, weight, weight.to(dtype))
    return round_parameters(cast(PreTrainedModel, model.unload()), dtype), survived


def round_trained(
    trained: PreTrainedModel, base: PreTrainedModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, SurvivedShares]:
    """Round a model whose every weight was trained, as `merge_adapter` does; both models are float32."""
    survived, before = SurvivedShares(), dict(base.named_parameters())
    for name, weight in trained.named_parameters():
        survived.add(
            name.removesuffix(".weight"), before[name].data, weight.data, weight.data.to(dtype)
        )
    return round_parameters(trained, dtype), survived


def _adapted_weight(layer: LoraLayer) -> nn.Parameter:
    """Return the base weight that a layer's adapter belongs to."""
    if isinstance(layer, ParamWrapper):
        weight: nn.Parameter = layer.get_param()
        return weight
    return layer.get_base_layer().weight  # type: ignore[return-value]
