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

    def update(self, x: Tensor, delta: Tensor) -> None:
        """Add delta^T x; x is (tokens, n), delta is (tokens, m)."""

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
        self.total = torch.zeros(m, n, device=device)

    def update(self, x: Tensor, delta: Tensor) -> None:
        """Add delta^T x to the sum."""
        self.total.addmm_(delta.T.float(), x.float())

    def next_pass(self) -> None:
        """Refuse: one pass is already exact."""
        raise RuntimeError("the exact estimator needs one pass")

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return the leading triplets of scale * G."""
        svd = truncated_svd(self.total, rank)
        norm = float(self.total.norm())
        kept = float(svd.S.norm())
        energy = min(1.0, (kept / norm) ** 2) if norm > 0 else 0.0
        return GradientEstimate(SVD(svd.U, svd.S * scale, svd.V), norm * scale, energy, 0.0)


class SketchedGradient:
    """A low-rank form of the gradient, G ~ left @ right^T, in (m + n) * width numbers.

    First pass, for each micro-batch with its G_b = delta^T x: one step of block power iteration on the
    running sum H = left right^T + G_b,

        omega = orth(right),    left <- orth(H omega),    right <- H^T left

    which needs only products of (tokens, n) and (tokens, m) with `width` columns. The basis is warm: it
    follows the sum as it grows, so that one pass over the data does the work of several. The first
    micro-batch starts from a random omega and takes the step twice.

    Every further pass holds one basis fixed and sums the other side over all samples, in turn
    right = G^T orth(left) and left = G orth(right): half a step of block power iteration on the whole G.

    Independent Rademacher probes Phi (n, p) are carried along in the first pass. G Phi is exact, and
    measures |G| and what any approximation leaves of it.

    Args:
        m: Output features.
        n: Input features.
        width: Columns kept, the rank wanted plus oversampling; cut to min(m, n).
        device: Where the sketch lives.
        generator: Source of the first omega and of Phi, on `device`.

    Source: the randomised range finder of Halko, Martinsson and Tropp (arXiv:0909.4061, section 4.5; the
    probes: section 4.3) as streamed block power iteration (Mitliagkas et al., arXiv:1307.0032). Differs:
    the power step acts on the running sum, not on independent blocks.
    """

    PROBES = 8

    def __init__(
        self, m: int, n: int, width: int, device: torch.device, generator: torch.Generator
    ) -> None:
        width = min(width, m, n)
        self.left: Tensor | None = None
        self.right = torch.randn(n, width, device=device, generator=generator)
        signs = torch.randint(0, 2, (n, self.PROBES), device=device, generator=generator)
        self.probes = signs.float() * 2 - 1
        self.probed = torch.zeros(m, self.PROBES, device=device)
        self._pass = 1

    def update(self, x: Tensor, delta: Tensor) -> None:
        """Take one micro-batch of (x, delta) into the sketch."""
        x, delta = x.float(), delta.float()
        if self._pass == 1:
            self.probed.addmm_(delta.T, x @ self.probes)
            if self.left is None:
                self.left = _orth(delta.T @ (x @ _orth(self.right)))
                self.right = x.T @ (delta @ self.left)
                self.left = _orth(delta.T @ (x @ _orth(self.right)))
                self.right = x.T @ (delta @ self.left)
            else:
                omega, core = torch.linalg.qr(self.right)
                image = torch.addmm(delta.T @ (x @ omega), self.left, core.T)
                left = _orth(image)
                kept = self.right @ (self.left.T @ left)
                self.left, self.right = left, kept.addmm_(x.T, delta @ left)
            return
        assert self.left is not None
        if self._pass % 2 == 0:
            self.right.addmm_(x.T, delta @ self.left)
        else:
            self.left.addmm_(delta.T, x @ self.right)

    def next_pass(self) -> None:
        """Fix the basis of one side and start summing the other side anew."""
        if self.left is None:
            return
        self._pass += 1
        if self._pass % 2 == 0:
            self.left, self.right = _orth(self.left), torch.zeros_like(self.right)
        else:
            self.left, self.right = torch.zeros_like(self.left), _orth(self.right)

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return all kept triplets of scale * G, and the energy that the first `rank` capture."""
        if self.left is None:
            self.left = self.probed.new_zeros(len(self.probed), self.right.shape[1])
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
