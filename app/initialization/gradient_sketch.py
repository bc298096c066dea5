"""A low-rank sketch of a layer's one-step gradient, and the products that layers with one input share."""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from app.initialization.factors import SVD, fix_signs, low_rank_svd
from app.initialization.gradient_estimators import GradientEstimate, largest, rank_error


class RandomColumns:
    """Random matrices, one for each number of rows, which all sketches share.

    Args:
        device: Where they are made.
        seed: Of all of them.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._seed = seed
        self._made: dict[tuple[str, int, int], Tensor] = {}

    def normal(self, kind: str, rows: int, columns: int) -> Tensor:
        """Return standard normal entries (rows, columns), for one kind of use always the same."""
        key = kind, rows, columns
        if key not in self._made:
            seed = zlib.crc32(f"{self._seed}:{kind}:{rows}:{columns}".encode())
            generator = torch.Generator(self.device).manual_seed(seed)
            self._made[key] = torch.randn(
                rows, columns, generator=generator, device=self.device, dtype=torch.float32
            )
        return self._made[key]

    def signs(self, kind: str, rows: int, columns: int) -> Tensor:
        """Return Rademacher entries: +1 and -1, equally likely."""
        return self.normal(kind, rows, columns).sign_()


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
    kept singular directions says how far these would turn if E were known (`rank_error`).

    The products with x are made by `SharedInput`, for all layers that read it at once.

    Args:
        width: Columns kept, the rank wanted plus oversampling; cut to min(m, n).
        columns: Makes noise and probes, which sketches of the same size share.

    Source: the randomised range finder of Halko, Martinsson and Tropp (arXiv:0909.4061, section 4.5; the
    probes: section 4.3) as streamed block power iteration (Mitliagkas et al., arXiv:1307.0032). Differs:
    the power step acts on the running sum, not on independent blocks.
    """

    PROBES = 8

    def __init__(self, m: int, n: int, width: int, columns: RandomColumns) -> None:
        width = min(width, m, n)
        # In memory all become transposed, as QR takes and gives them and as they are multiplied fastest.
        # Zero takes no memory: the first micro-batch, which is the largest, ends before all layers have begun.
        zero = torch.zeros((), device=columns.device, dtype=torch.float32)
        self.left, self.right = zero.expand(m, width), zero.expand(n, width)
        self.right_probes = columns.signs("input probes", self.PROBES, n).T  # Phi
        self.left_probes = columns.signs("output probes", self.PROBES, m).T  # Psi
        self.noise = columns.normal("noise", width, n).T
        self.image = zero.expand(m, self.PROBES)  # G Phi
        self.coimage = zero.expand(n, self.PROBES)  # G^T Psi
        self._pass = 1
        self._started = False
        self._turn: Tensor | None = None  # new left^T old left of the step under way
        self.awaited: SharedInput | None = None  # which has the products for `finish`

    def update(self, x: Tensor, delta: Tensor) -> Tensor:
        """Add one micro-batch of (x, delta); return a number that is finite only if both are."""
        return SharedInput(x, [self]).update(self, delta)

    def basis(self, right: Tensor) -> Tensor:
        """Return an orthonormal basis of right (n, width), its empty columns filled at random."""
        size = torch.linalg.vector_norm(right)
        return _orth(torch.addcmul(right, self.noise, torch.where(size > 0, 1e-7 * size, 1.0)))

    def columns(self) -> Tensor:
        """Return what x is multiplied by first in this pass: omega, nothing, or the held basis; (n, k)."""
        if self._pass == 1:
            return self.basis(self.right)
        return self.right[:, : 0 if self._pass % 2 == 0 else None]

    def probes(self) -> Tensor:
        """Return the probes that x is multiplied by in this pass, (n, p) or none."""
        return self.right_probes if self._pass == 1 else self.right_probes[:, :0]

    def start(
        self, x: Tensor, delta: Tensor, omega: Tensor, y: Tensor, probed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in delta (tokens, m); return z (k, tokens), whose product z x is for `finish`, and a number.

        The number is finite only if x and delta are.

        Args:
            x: Shape (tokens, n).
            delta: Shape (tokens, m).
            omega: `columns()` as they were when the products with x were made.
            y: (x omega)^T, shape (k, tokens).
            probed: (x `probes()`)^T, shape (p, tokens).
        """
        if self._pass % 2 == 0:
            z = self.left.T @ delta.T
            return z, largest(x, z)
        if self._pass > 1:
            added = y @ delta
            self.left += added.T
            return y[:0], added.sum()
        if not self._started:
            self._started = True
            # Only the better basis is kept: `left` is still zero, so H is this micro-batch alone.
            omega = self.basis(((delta @ _orth((y @ delta).T)).T @ x).T)
            y = (x @ omega).T
        width = len(y)
        products = torch.cat([y, probed]) @ delta
        left = _orth(torch.addmm(products[:width], omega.T @ self.right, self.left.T).T)
        self.image = self.image + products[width:].T
        self._turn, self.left = left.T @ self.left, left
        return torch.cat([left.T, self.left_probes.T]) @ delta.T, products.sum()

    def finish(self, products: Tensor) -> None:
        """End what `start` began, with z x (k, n)."""
        if self._turn is not None:
            width = self.right.shape[1]
            self.right = torch.addmm(products[:width], self._turn, self.right.T).T
            self.coimage = self.coimage + products[width:].T
            self._turn = None
        elif len(products):
            self.right += products.T

    def settle(self) -> None:
        """End the step under way."""
        if self.awaited:
            self.awaited.finish()

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

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return left and right, to be overwritten."""
        self.left, self.right = self.left.clone(), self.right.clone()
        return self.left, self.right

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
            rank_error=rank_error(svd, rank, missed, comissed, self.right_probes, self.left_probes),
        )


class SharedInput:
    """One input x and the sketches of all layers that read it: their products with x are made together.

        (x [omega_q omega_k omega_v Phi])^T before the first delta is taken in, [z_q z_k z_v] x after the last

    Args:
        x: Shape (tokens, n), any float dtype.
        sketches: Of the layers, all in the same pass; one that reads x twice is there twice.
    """

    def __init__(self, x: Tensor, sketches: Sequence[SketchedGradient]) -> None:
        self.x = x.float()
        # Readers without a delta; after the last one all steps are ended.
        self.missing = len(sketches)
        self._waiting: list[tuple[SketchedGradient, Tensor]] = []
        sketches = list(dict.fromkeys(sketches))
        for sketch in sketches:
            sketch.settle()
        columns = [sketch.columns() for sketch in sketches]
        parts = [part.T for part in (*columns, sketches[0].probes())]
        products = torch.cat(parts) @ self.x.T
        *images, self._probed = products.split([len(part) for part in parts])
        self._images = dict(zip(sketches, zip(columns, images, strict=True), strict=True))

    def update(self, sketch: SketchedGradient, delta: Tensor) -> Tensor:
        """Add (x, delta) to a sketch; return a number that is finite only if both are."""
        sketch.settle()  # of the same layer's earlier use
        delta = delta.float()
        z, found = sketch.start(self.x, delta, *self._images[sketch], self._probed)
        self._waiting.append((sketch, z))
        sketch.awaited = self
        self.missing -= 1
        if self.missing == 0:
            self.finish()
        return found

    def finish(self) -> None:
        """End the steps of all sketches that have taken in their delta."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        products = torch.cat([z for _, z in waiting]) @ self.x
        for (sketch, _), part in zip(
            waiting, products.split([len(z) for _, z in waiting]), strict=True
        ):
            sketch.awaited = None
            sketch.finish(part)


def _orth(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]
