"""Two ways to keep a layer's one-step gradient while the observer streams it: whole, or as a sketch."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.spectral_init import SVD, fix_signs, low_rank_svd, truncated_svd


@dataclass(frozen=True)
class GradientEstimate:
    """What an initialisation needs to know of one layer's gradient G (m, n).

    Attributes:
        svd: Leading triplets of G in descending order, float32; at least the rank asked for.
        norm: Frobenius norm of G; exact for the exact estimator, from random probes for the sketch.
        captured_energy: |G_r|^2 / |G|^2 of the installed rank-r part, in [0, 1], measured the same way.
        sketch_residual: |G - L R^T| / |G| of the kept low-rank form; 0 for the exact estimator.
    """

    svd: SVD
    norm: float
    captured_energy: float
    sketch_residual: float


class GradientAccumulator(Protocol):
    """Takes a layer's (x, delta) stream, over one or more passes through the same samples."""

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x; x is (tokens, n), delta is (tokens, m).

        Returns:
            A small tensor whose entries are all finite only if those of x and delta are.
        """

    def next_pass(self) -> None:
        """Prepare for one more pass over the same samples."""

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return the gradient's leading triplets, multiplied by `scale`."""


class ExactGradient:
    """The whole gradient, G = sum_t delta_t x_t^T, in float32: m * n numbers.

    Args:
        m: Output features.
        n: Input features.
        device: Where the sum lives.
    """

    def __init__(self, m: int, n: int, device: torch.device) -> None:
        self.total = torch.zeros(m, n, device=device, dtype=torch.float32)

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x to the sum."""
        x, delta = x.float(), delta.float()
        self.total.addmm_(delta.T, x)
        return x.sum() + delta.sum()

    def next_pass(self) -> None:
        """Refuse: one pass is already exact."""
        raise RuntimeError("the exact estimator needs one pass")

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return the leading triplets of scale * G."""
        svd = truncated_svd(self.total, rank)
        # In float64: what is left out is a small difference of the two.
        norm = float(torch.linalg.vector_norm(self.total, dtype=torch.float64))
        kept = float(torch.linalg.vector_norm(svd.S, dtype=torch.float64))
        energy = min(1.0, (kept / norm) ** 2) if norm > 0 else 0.0
        return GradientEstimate(SVD(svd.U, svd.S * scale, svd.V), norm * scale, energy, 0.0)


class SketchedGradient:
    """A low-rank form of the gradient, G ~ left @ right^T, in (m + n) * width numbers.

    First pass, for each micro-batch with its G_b = delta^T x: one step of block power iteration on the
    running sum H = left right^T + G_b,

        omega = orth(right + noise),    left <- orth(H omega),    right <- H^T left

    which needs only products of (tokens, n) and (tokens, m) with `width` columns. The basis is warm: it
    follows the sum as it grows, so that one pass over the data does the work of several. The noise, of
    rounding size, fills the columns that `right` leaves empty with random directions (all of them before
    the first micro-batch, most after micro-batches of few tokens); without it these would be
    coordinate axes, which sparse inputs can miss. The first micro-batch takes the step twice.

    Every further pass holds one basis fixed and sums the other side over all samples, in turn
    right = G^T orth(left) and left = G orth(right): half a step of block power iteration on the whole G.

    Independent Rademacher probes Phi (n, p) are carried along in the first pass. G Phi is exact, and
    measures |G| and what any approximation leaves of it.

    Args:
        m: Output features.
        n: Input features.
        width: Columns kept, the rank wanted plus oversampling; cut to min(m, n).
        device: Where the sketch lives.
        generator: Source of the noise and of Phi, on `device`.

    Source: the randomised range finder of Halko, Martinsson and Tropp (arXiv:0909.4061, section 4.5; the
    probes: section 4.3) as streamed block power iteration (Mitliagkas et al., arXiv:1307.0032). Differs:
    the power step acts on the running sum, not on independent blocks.
    """

    PROBES = 8

    def __init__(
        self, m: int, n: int, width: int, device: torch.device, generator: torch.Generator
    ) -> None:
        width = min(width, m, n)
        self.left = torch.zeros(m, width, device=device, dtype=torch.float32)
        self.right = torch.zeros(n, width, device=device, dtype=torch.float32)
        signs = torch.randint(0, 2, (n, self.PROBES), device=device, generator=generator)
        self.probes = signs.to(torch.float32) * 2 - 1
        self.probed = torch.zeros(m, self.PROBES, device=device, dtype=torch.float32)
        self._generator = generator
        self._pass = 1
        self._started = False

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Take one micro-batch of (x, delta) into the sketch."""
        x, delta = x.float(), delta.float()
        if self._pass == 1:
            if not self._started:
                self._started = True
                # Only the better start is kept: `left` is still zero, so H is this micro-batch alone.
                _, self.right, _ = self._power_step(x, delta)
            self.left, self.right, probed = self._power_step(x, delta)
            self.probed += probed
            return probed
        if self._pass % 2 == 0:
            added = x.T @ (delta @ self.left)
            self.right += added
        else:
            added = delta.T @ (x @ self.right)
            self.left += added
        return added

    def _power_step(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.right.shape[1]
        noise = torch.empty_like(self.right).normal_(generator=self._generator)
        top = self.right.abs().amax()
        omega = _orth(self.right + torch.where(top > 0, 1e-6 * top, 1.0) * noise)
        products = delta.T @ (x @ torch.cat([omega, self.probes], dim=1))
        image = torch.addmm(products[:, :width], self.left, self.right.T @ omega)
        left = _orth(image)
        right = torch.addmm(self.right @ (self.left.T @ left), x.T, delta @ left)
        return left, right, products[:, width:]

    def next_pass(self) -> None:
        """Fix the basis of one side and start summing the other side anew."""
        self._pass += 1
        if self._pass % 2 == 0:
            self.left, self.right = _orth(self.left), torch.zeros_like(self.right)
        else:
            self.left, self.right = torch.zeros_like(self.left), _orth(self.right)

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return all kept triplets of scale * G, and the energy that the first `rank` capture."""
        svd = fix_signs(low_rank_svd(self.left, self.right, self.right.shape[1]))
        missed = self.probed - self.left @ (self.right.T @ self.probes)
        outside = float(missed.square().sum()) / self.PROBES
        # What the sketch holds is known; only what it misses has to be estimated. The two are nearly
        # orthogonal, so their squares add, and the probes' noise touches the small part alone.
        kept = float(svd.S[:rank].square().sum())
        total = float(svd.S.square().sum()) + outside
        if total == 0:
            return GradientEstimate(SVD(svd.U, svd.S * scale, svd.V), 0.0, 0.0, 0.0)
        return GradientEstimate(
            svd=SVD(svd.U, svd.S * scale, svd.V),
            norm=total**0.5 * scale,
            captured_energy=kept / total,
            sketch_residual=(outside / total) ** 0.5,
        )


def _orth(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]
