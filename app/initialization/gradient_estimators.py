"""Estimators of a layer's one-step gradient from its stream of (x, delta): the exact sum, or a sketch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.initialization.factors import SVD, fix_signs, low_rank_svd, truncated_svd


@dataclass(frozen=True)
class GradientEstimate:
    """Singular triplets of one layer's gradient G (m, n), and how exact they are.

    The exact estimator knows the numbers exactly; for the sketch they come from random probes.
    """

    svd: SVD  # leading triplets of G in descending order, float32; at least the rank asked for
    norm: float  # Frobenius norm of G
    captured_energy: float  # |G_r|^2 / |G|^2 of the installed rank-r part, in [0, 1]
    rank_error: float  # |G_hat_r - G_r| / |G_r|, of the installed rank-r part G_hat_r from the best one, G_r


class ExactGradient:
    """Sum the whole gradient, G = sum_t delta_t x_t^T (m, n), in float32: m * n numbers."""

    def __init__(self, m: int, n: int, device: torch.device) -> None:
        self.total = torch.zeros(m, n, device=device, dtype=torch.float32)

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x to the sum; return the extremes of both."""
        x, delta = x.float(), delta.float()
        self.total.addmm_(delta.T, x)
        return extremes(x, delta)

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return the leading triplets of scale * G."""
        # In float64: what is left out is a small difference of the two.
        norm = float(torch.linalg.vector_norm(self.total, dtype=torch.float64))
        if not math.isfinite(norm):
            raise ValueError("its sum is not finite")
        svd = truncated_svd(self.total, rank)
        kept = float(torch.linalg.vector_norm(svd.S, dtype=torch.float64))
        energy = min(1.0, (kept / norm) ** 2) if norm > 0 else 0.0
        return GradientEstimate(SVD(svd.U, svd.S * scale, svd.V), norm * scale, energy, 0.0)


def extremes(x: Tensor, delta: Tensor) -> Tensor:
    """Return the smallest and the largest entry of each: finite exactly if all are, however many and large."""
    if len(x) == 0:  # an expert without tokens
        return x.new_zeros(4)
    # A norm would say the same, and takes a third of the product's time on a CPU.
    return torch.stack([*torch.aminmax(x), *torch.aminmax(delta)])


class SketchedGradient:
    """Keep a low-rank form of the gradient, G ~ left @ right^T, in (m + n) * width numbers.

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

    Independent Rademacher probes Phi (n, p) and Psi (m, p) are carried along in the first pass. G Phi and
    G^T Psi are exact, and measure |G| and the missed part E = G - left right^T: how much of E lies in the
    kept singular directions says how far these would turn if E were known (`_rank_error`).

    Args:
        width: Columns kept, the rank wanted plus oversampling; cut to min(m, n).
        generator: Source of the noise and of the probes, on `device`.

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
        self._generator = generator
        self.right_probes, self.left_probes = self._signs(n), self._signs(m)  # Phi and Psi
        self.image = torch.zeros_like(self.left_probes)  # G Phi
        self.coimage = torch.zeros_like(self.right_probes)  # G^T Psi
        self._pass = 1
        self._started = False

    def _signs(self, rows: int) -> Tensor:
        """Draw Rademacher probes: entries +1 and -1, equally likely."""
        generator = self._generator
        ones = torch.randint(
            0, 2, (rows, self.PROBES), device=generator.device, generator=generator
        )
        return ones.to(torch.float32) * 2 - 1

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add one micro-batch of (x, delta) to the sketch; what is returned is finite only if both are."""
        x, delta = x.float(), delta.float()
        if self._pass == 1:
            if not self._started:
                self._started = True
                # Only the better basis is kept: `left` is still zero, so H is this micro-batch alone.
                _, self.right, _, _ = self._power_step(x, delta)
            self.left, self.right, image, coimage = self._power_step(x, delta)
            self.image += image
            self.coimage += coimage
            return image
        if self._pass % 2 == 0:
            added = x.T @ (delta @ self.left)
            self.right += added
        else:
            added = delta.T @ (x @ self.right)
            self.left += added
        return added

    def _power_step(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width = self.right.shape[1]
        noise = torch.empty_like(self.right).normal_(generator=self._generator)
        top = self.right.abs().amax()
        omega = _orth(self.right + torch.where(top > 0, 1e-6 * top, 1.0) * noise)
        products = delta.T @ (x @ torch.cat([omega, self.right_probes], dim=1))
        left = _orth(torch.addmm(products[:, :width], self.left, self.right.T @ omega))
        coproducts = x.T @ (delta @ torch.cat([left, self.left_probes], dim=1))
        right = torch.addmm(coproducts[:, :width], self.right, self.left.T @ left)
        return left, right, products[:, width:], coproducts[:, width:]

    def next_pass(self) -> None:
        """Hold the basis of one side and sum the other side anew."""
        self._pass += 1
        if self._pass % 2 == 0:
            self.left, self.right = _orth(self.left), torch.zeros_like(self.right)
        else:
            self.left, self.right = torch.zeros_like(self.left), _orth(self.right)

    def partial(self) -> list[Tensor]:
        """Return what this pass has summed over this process's samples alone."""
        if self._pass == 1:
            return [self.left, self.right, self.image, self.coimage]
        return [self.right] if self._pass % 2 == 0 else [self.left]

    def merge(self, partials: Sequence[Sequence[Tensor]]) -> None:
        """Replace this sketch by that of the sum of several processes' gradients.

        After the first pass their low-rank forms are added and cut to the width again; after a further
        one the fixed side is the same everywhere, and the other sides add up. The probes always do. `partials`
        are `partial()` of every process, this one's among them; all drew the same probes.
        """
        columns = list(zip(*partials, strict=True))
        if self._pass == 1:
            lefts, rights, images, coimages = columns
            svd = low_rank_svd(torch.cat(lefts, 1), torch.cat(rights, 1), self.right.shape[1])
            self.left, self.right = svd.U, svd.V * svd.S
            self.image, self.coimage = torch.stack(images).sum(0), torch.stack(coimages).sum(0)
        elif self._pass % 2 == 0:
            self.right = torch.stack(columns[0]).sum(0)
        else:
            self.left = torch.stack(columns[0]).sum(0)

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return all kept triplets of scale * G, and the energy that the first `rank` capture."""
        svd = fix_signs(low_rank_svd(self.left, self.right, self.right.shape[1]))
        scaled = SVD(svd.U, svd.S * scale, svd.V)
        missed = self.image - self.left @ (self.right.T @ self.right_probes)  # E Phi
        comissed = self.coimage - self.right @ (self.left.T @ self.left_probes)  # E^T Psi
        outside = float(missed.square().sum() + comissed.square().sum()) / (2 * self.PROBES)
        # What the sketch holds is known; only what it misses has to be estimated. The two are nearly
        # orthogonal, so their squares add, and the probes' noise touches the small part alone.
        kept = float(svd.S[:rank].square().sum())
        total = float(svd.S.square().sum()) + outside
        if not math.isfinite(total):
            raise ValueError("its sketch is not finite")
        if total == 0:
            return GradientEstimate(scaled, 0.0, 0.0, 0.0)
        return GradientEstimate(
            svd=scaled,
            norm=total**0.5 * scale,
            captured_energy=kept / total,
            rank_error=_rank_error(
                svd, rank, missed, comissed, self.right_probes, self.left_probes
            ),
        )


def _rank_error(
    svd: SVD, rank: int, missed: Tensor, comissed: Tensor, right_probes: Tensor, left_probes: Tensor
) -> float:
    """Estimate |P_r(H + E) - P_r(H)| / |P_r(H)|, the error of the leading part of a sketch H of H + E.

        P_r(H + E) - P_r(H) ~ U_r U_r^T E + E V_r V_r^T          wherever E is outside the kept k x k core
        P_r(diag(S) + U^T E V) - P_r(diag(S))                    inside it

    The first line is perturbation theory; the norms of U_r^T E and E V_r come from the probes. The second
    decides which of two nearly equal singular values belongs to the leading r, where first order fails;
    the probes give U^T E V with noise, so that for such layers the estimate errs upwards.

    Of H all k kept triplets are given; `missed` is E Phi (m, p) and `comissed` E^T Psi (n, p), of the probes
    Phi (n, p) and Psi (m, p).
    """
    U, S, V = svd.U.double(), svd.S.double(), svd.V.double()
    probes = missed.shape[1]
    rows = U.T @ missed.double()  # U^T E Phi
    columns = comissed.double().T @ V  # Psi^T E V
    # U^T E V twice, from either side, weighted by the inverse of each one's variance: after an even
    # pass U^T E is zero, after an odd one from the third E V is, and so is their product.
    noise_right = rows.square().sum(1, keepdim=True)
    noise_left = columns.square().sum(0, keepdim=True)
    weight = noise_left / (noise_left + noise_right).clamp(min=torch.finfo(U.dtype).tiny)
    from_right, from_left = (
        rows @ (right_probes.double().T @ V),
        (U.T @ left_probes.double()) @ columns,
    )
    core = (weight * from_right + (1 - weight) * from_left) / probes
    outer = (rows[:rank].square().sum() + columns[:, :rank].square().sum()) / probes
    u, s, vh = torch.linalg.svd(torch.diag(S) + core)
    core_error = u[:, :rank] * s[:rank] @ vh[:rank]
    core_error.diagonal()[:rank].sub_(S[:rank])
    # `outer` holds the leading rows and columns of the core, too, with the same noise.
    counted = core[:rank].square().sum() + core[:, :rank].square().sum()
    error = (outer - counted + core_error.square().sum()).clamp(min=0)
    return float((error / S[:rank].square().sum()).sqrt())


def _orth(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]
