"""Move the base weights themselves along their one-step gradient, W - eta G, and take it back bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from app.initialization.factors import SVD
from app.initialization.gradient_store import ExactStore
from app.initialization.one_step_gradient import OneStepResult
from app.models.lora import LoraPair, base_weight


@dataclass(frozen=True)
class WholeGradient:
    """A layer's gradient G (m, n), float32, and its leading triplets."""

    G: Tensor
    svd: SVD

    def step(self, size: float, rank: int | None) -> Tensor:
        """Return size * G (m, n), or size * G_r, its best approximation of a rank that the triplets reach."""
        if rank is None:
            return size * self.G
        U, S, V = (part[..., :rank] for part in self.svd)
        return U * (size * S) @ V.T


def whole_gradients(result: OneStepResult) -> dict[str, WholeGradient]:
    """Take the layers' gradients out of what the exact estimator has kept of them on one process."""
    store = result.store
    assert isinstance(store, ExactStore)
    return {
        name: WholeGradient(store.sums[name].total.div_(result.divisor), estimate.svd)
        for name, estimate in result.estimates.items()
    }


@contextmanager
def stepped(pairs: Sequence[LoraPair], step: Callable[[str], Tensor]) -> Iterator[None]:
    """Put W - step in the place of every pair's base weight W; afterwards each one is what it was, bit for bit.

    Args:
        pairs: With weights that are whole, not quantised, and no other module's.
        step: Returns the step (m, n) of the layer of a name; the difference is rounded once, to W's type.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in pairs:
            W = base_weight(pair)
            kept.append((W, W.clone()))
            W.copy_(W - step(pair.name))
        yield
    finally:
        for W, before in kept:
            W.copy_(before)
