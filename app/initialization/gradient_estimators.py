"""Estimators of a layer's one-step gradient from its stream of (x, delta): the exact sum, and errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.initialization.factors import SVD, truncated_svd


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
    """Sum the whole gradient, G = sum_t delta_t x_t^T (m, n), in float32: m * n numbers.

    With `signs` what is decomposed is sign(G), the direction of AdamW's first step.
    """

    def __init__(self, m: int, n: int, device: torch.device, signs: bool = False) -> None:
        self.total = torch.zeros(m, n, device=device, dtype=torch.float32)
        self.signs = signs

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x to the sum; return a number that is finite only if both are."""
        x, delta = x.float(), delta.float()
        self.total.addmm_(delta.T, x)
        return largest(x, delta)

    def estimate(self, rank: int, scale: float) -> GradientEstimate:
        """Return the leading triplets of scale * G; `rank_error` is their residual, |G V - U S| / |S|.

        Those of sign(G), whatever the scale, with `signs`.
        """
        # In float64: what is left out is a small difference of the two.
        norm = float(torch.linalg.vector_norm(self.total, dtype=torch.float64))
        if not math.isfinite(norm):
            raise ValueError("its sum is not finite")
        if self.signs:
            self.total, scale = self.total.sign_(), 1.0
            norm = float(torch.linalg.vector_norm(self.total, dtype=torch.float64))
        svd = truncated_svd(self.total, rank)
        kept = float(torch.linalg.vector_norm(svd.S, dtype=torch.float64))
        energy = min(1.0, (kept / norm) ** 2) if norm > 0 else 0.0
        residual = torch.linalg.vector_norm(self.total @ svd.V - svd.U * svd.S, dtype=torch.float64)
        error = float(residual) / kept if kept > 0 else 0.0
        return GradientEstimate(SVD(svd.U, svd.S * scale, svd.V), norm * scale, energy, error)


def largest(*tensors: Tensor) -> Tensor:
    """Return the largest size of an entry: finite exactly if all are, however many and large."""
    # An expert without tokens has none. A norm would say the same, and takes ten times as long on a CPU.
    extremes = [end for t in tensors if t.numel() for end in torch.aminmax(t)]
    return torch.stack(extremes).abs().amax() if extremes else tensors[0].new_zeros(())


def rank_error(
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
