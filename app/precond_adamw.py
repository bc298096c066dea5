"""AdamW on preconditioned LoRA gradients, with the r x r work of all adapters done in batches.

Shapes everywhere: `lora_A` (r, n), `lora_B` (m, r), weight update scaling * lora_B @ lora_A (m, n).
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# Gram matrices are computed and factored in float64. A damping below this fraction of a diagonal
# entry is inside the rounding error of the Gram matrix itself (sums of up to some 10^4 terms).
_NOISE = 4096 * torch.finfo(torch.float64).eps

Maybe = Sequence[Tensor | None]


class _Job(NamedTuple):
    """Equal-shaped gradients of one kind that are preconditioned together."""

    grad_of: Literal["lora_A", "lora_B"]
    pairs: list[int]


# One batch of r x r solves for each (device, rank).
_Plan = dict[tuple[torch.device, int], list[_Job]]


def gram_matrices(factors: Sequence[Tensor], kind: Literal["lora_A", "lora_B"]) -> Tensor:
    """Stack the Gram matrices of equal-shaped factors.

        lora_A @ lora_A^T   or   lora_B^T @ lora_B

    A function of its own because it is a sum over n (or m): with sharded factors an all-reduce of
    its result belongs between it and `damped_inverse`.

    Args:
        factors: P tensors of one shape, (r, n) for `kind` "lora_A" and (m, r) for "lora_B"; one
            floating dtype and device. Not modified.
        kind: Which factor they are.

    Returns:
        Tensor of shape (P, r, r), float64: the products of float32 numbers are exact in it, so a
        damping far below float32's resolution of the Gram matrix still acts as it should.

    Source: arXiv:2502.01235, eq. 9. Differs: float64 inside; the authors stay in float32.
    """
    stacked = factors[0].new_empty((len(factors), *factors[0].shape), dtype=torch.float64)
    torch._foreach_copy_(list(stacked.unbind()), list(factors))  # stack and widen in one pass
    return stacked @ stacked.mT if kind == "lora_A" else stacked.mT @ stacked


def damped_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
    """Invert positive semi-definite matrices after adding damping to their diagonals.

        inverse = (gram + damping I)^-1 = L^-T L^-1,   L L^T = gram + damping I

    With damping > 0 nothing here can fail and nothing waits for the GPU: where damping is below
    the rounding error of a diagonal entry (9e-13 of it), that error takes its place. The Cholesky
    factorisation of a finite matrix then succeeds, and the exact damping is used in every case
    where float64 could tell the difference. With damping == 0 the matrices are used as they are
    and reported as singular where a pivot is all rounding error, a test that no rescaling of the
    factor's rank-one terms changes.

    Args:
        gram: Symmetric positive semi-definite matrices, shape (P, r, r), float64. Not modified.
        damping: Number added to each diagonal, >= 0.

    Returns:
        The inverses (P, r, r), float64, and None or, if damping == 0, a bool tensor (P,) that marks
        the singular matrices, whose inverses are meaningless. Matrices that are not finite give
        results that are not finite, without an error.

    Source: arXiv:2402.02347. Differs: the authors take the identity where an inverse fails; a
    Cholesky factorisation in place of a general inverse.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if damping > 0:
        gram = gram + torch.diag_embed((_NOISE * diagonal).clamp(min=damping))
    # check_errors=False: reading the status on the host would stall the GPU at every step.
    lower, info = torch.linalg.cholesky_ex(gram, check_errors=False)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    root = torch.linalg.solve_triangular(lower, eye, upper=False)
    if damping > 0:
        return root.mT @ root, None
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    failed = (info > 0) | (pivots <= _NOISE * diagonal).any(-1)
    return root.mT @ root, failed & diagonal.isfinite().all(-1)


@torch.no_grad()
def precondition_pairs(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Maybe,
    grad_B: Maybe,
    damping: float,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Precondition the gradients of many LoRA pairs, each by the Gram matrix of the other factor.

        P_A = (lora_B^T lora_B + damping I)^-1 grad_A
        P_B = grad_B (lora_A lora_A^T + damping I)^-1

    Args:
        lora_A: One tensor (r, n) a pair; r, n, dtype and device may differ from pair to pair.
        lora_B: One tensor (m, r) a pair. Neither factor is modified.
        grad_A: Gradients like `lora_A`, or None where there is none. Not modified.
        grad_B: Gradients like `lora_B`, or None where there is none. Not modified.
        damping: Number added to the diagonal of each Gram matrix, >= 0.

    Returns:
        P_A and P_B, lists like `grad_A` and `grad_B` with None in the same places, in the dtype
        of each gradient and the memory layout of each factor. The product is taken in float32, or
        in the gradient's dtype if that is wider. Gradients that are not finite stay so.

    Raises:
        RuntimeError: damping is 0 and a Gram matrix that is needed is singular; the message names
            the pair.

    Source: arXiv:2402.02347; arXiv:2502.01235, eq. 9. Differs: damping; both from the old factors
    (the authors' code updates lora_A before it looks at it for lora_B).
    """
    factors = {"lora_A": lora_A, "lora_B": lora_B}
    grads = {"lora_A": grad_A, "lora_B": grad_B}
    results: dict[str, list[Tensor | None]] = {k: [None] * len(g) for k, g in grads.items()}
    for jobs in _plan(lora_A, lora_B, grad_A, grad_B).values():
        grams = []
        for job in jobs:
            kind: Literal["lora_A", "lora_B"] = "lora_B" if job.grad_of == "lora_A" else "lora_A"
            grams.append(gram_matrices([factors[kind][i] for i in job.pairs], kind))
        inverses, singular = damped_inverse(torch.cat(grams), damping)
        if singular is not None and bool(singular.any()):
            _raise_singular(jobs, int(singular.nonzero()[0, 0]))
        for job, inverse in zip(
            jobs, inverses.split([len(job.pairs) for job in jobs]), strict=True
        ):
            raw = torch.stack([grads[job.grad_of][i] for i in job.pairs])  # type: ignore[misc]
            wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
            inverse = inverse.to(wide.dtype)
            out = inverse @ wide if job.grad_of == "lora_A" else wide @ inverse
            for i, grad in zip(job.pairs, out.to(raw.dtype).unbind(), strict=True):
                factor = factors[job.grad_of][i]
                # Fused kernels walk parameter and gradient in memory order without looking at
                # strides, so a transposed factor needs a gradient that is laid out like it.
                results[job.grad_of][i] = (
                    grad
                    if factor.is_contiguous()
                    else torch.empty_like(factor, dtype=grad.dtype).copy_(grad)
                )
    return results["lora_A"], results["lora_B"]


def _plan(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], grad_A: Maybe, grad_B: Maybe
) -> _Plan:
    """Collect the gradients that can share a stack, in stacks of limited size."""
    stacks: dict[tuple[Any, ...], list[int]] = {}
    for i, (a, b, g_a, g_b) in enumerate(zip(lora_A, lora_B, grad_A, grad_B, strict=True)):
        if g_a is not None:
            stacks.setdefault(
                ("lora_A", a.shape, b.shape, b.dtype, g_a.dtype, a.device), []
            ).append(i)
        if g_b is not None:
            stacks.setdefault(
                ("lora_B", a.shape, b.shape, a.dtype, g_b.dtype, a.device), []
            ).append(i)
    plan: _Plan = {}
    for (grad_of, a_shape, b_shape, *_, device), pairs in stacks.items():
        # On CPU a stack that stays in the cache is faster; elsewhere fewer launches are.
        limit = 2**17 if device.type == "cpu" else 2**24
        size = max(1, limit // max(a_shape.numel(), b_shape.numel()))
        plan.setdefault((device, a_shape[0]), []).extend(
            _Job(grad_of, pairs[start : start + size]) for start in range(0, len(pairs), size)
        )
    return plan


def _raise_singular(jobs: list[_Job], position: int) -> None:
    """Name the pair whose Gram matrix stands at `position` in the batch."""
    grad_of, pair = [(job.grad_of, pair) for job in jobs for pair in job.pairs][position]
    product = "lora_B^T lora_B" if grad_of == "lora_A" else "lora_A lora_A^T"
    raise RuntimeError(
        f"pair {pair}: {product} is singular, so the gradient of {grad_of} cannot be "
        "preconditioned with damping 0; set damping > 0 (LoRA's usual start has lora_B = 0)"
    )


class PreconditionedAdamW(torch.optim.AdamW):
    """AdamW whose moments see the preconditioned gradients of LoRA pairs.

        P_A = (lora_B^T lora_B + damping I)^-1 grad_A
        P_B = grad_B (lora_A lora_A^T + damping I)^-1          then AdamW on P_A and P_B

    A parameter group with `lora_pairs: True` lists its parameters as lora_A_0, lora_B_0, lora_A_1,
    lora_B_1, ...; any other group is plain AdamW, bit for bit. `.grad` holds the raw gradient
    before and after a step. A factor without a gradient (frozen, or unused in this step) is left
    alone and still preconditions its partner.

    Args:
        params: Parameters or groups, as torch's optimizers take them.
        lr: Step size; also per group.
        betas: Decay rates of the first and second moment; also per group.
        eps: Added to the root of the second moment; also per group.
        weight_decay: Decoupled weight decay, per unit of lr; also per group.
        damping: Number added to the diagonal of each r x r Gram matrix, >= 0; also per group. Its
            unit is that of squared factor entries summed over n (or m), so the best value depends
            on the task. Where it is far above the Gram matrix, the step is plain AdamW's. Note
            that Lightning's `gradient_clip_val` clips the raw gradients: it works inside the
            closure, before the preconditioning.
        foreach: As in torch.
        fused: As in torch; by default a group on CPU or CUDA uses the fused kernel unless
            `foreach` is given. Under float16 scaling, `fused=True` leaves the unscaling to the
            kernel (the preconditioning is linear, so the scale passes through), and Lightning then
            refuses to clip; the default lets the scaler divide first, so that clipping works.

    Raises:
        ValueError: A `lora_pairs` group is not made of matching pairs, or damping is negative.

    Source: arXiv:2402.02347, arXiv:2502.01235 eq. 9. Differs from the authors' code: torch's bias
    correction (they have none, so their first step is 3.16 lr), both factors preconditioned by the
    old values, weight decay before the update, eps 1e-8 as in LoRA-One.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._damping = damping
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; a `lora_pairs` group is checked.

        Args:
            param_group: `params` and any option of the constructor; `lora_pairs: True` marks pairs.

        Raises:
            ValueError: See the class.
        """
        if "damping" not in self.defaults:  # torch writes the defaults anew in its constructor
            self.defaults.update(lora_pairs=False, damping=self._damping)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if group["fused"] is None and group["foreach"] is None:
            plain = all(
                type(p) in (Tensor, torch.nn.Parameter)
                and p.is_floating_point()
                and p.device.type in ("cpu", "cuda")
                for p in group["params"]
            )
            group["fused"] = plain or None  # None lets torch choose between foreach and a loop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch, after a check that it has the same `lora_pairs` groups.

        Args:
            state_dict: What `state_dict` of this class returned.

        Raises:
            ValueError: The groups differ, e.g. because the state is plain AdamW's, whose moments
                are of another gradient.
        """
        found = [bool(group.get("lora_pairs")) for group in state_dict["param_groups"]]
        expected = [bool(group["lora_pairs"]) for group in self.param_groups]
        if found != expected:
            raise ValueError(
                f"the optimizer state has lora_pairs {found} in its groups, expected {expected}: "
                "it was saved with another optimizer or another grouping of the parameters"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure, precondition the gradients it leaves, update the parameters.

        Args:
            closure: Computes loss and gradients; called once, first, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: damping is 0 and a Gram matrix is singular; no parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw: list[tuple[Tensor, Tensor]] = []
        try:
            for group in self.param_groups:
                if not group["lora_pairs"]:
                    continue
                lora_A, lora_B = group["params"][::2], group["params"][1::2]
                new_A, new_B = precondition_pairs(
                    lora_A,
                    lora_B,
                    [p.grad for p in lora_A],
                    [p.grad for p in lora_B],
                    group["damping"],
                )
                for param, new in zip(lora_A + lora_B, new_A + new_B, strict=True):
                    if new is not None:
                        raw.append((param, param.grad))
                        param.grad = new
            # torch wraps `step` of every optimizer class that was ever constructed in one that
            # runs the step hooks. They run around this method, so not again around the inner one.
            adamw_step = inspect.unwrap(
                torch.optim.AdamW.step, stop=lambda f: not getattr(f, "hooked", False)
            )
            adamw_step(self)
        finally:
            for param, grad in raw:
                param.grad = grad
        return loss


def _check_group(group: dict[str, Any]) -> None:
    """Raise ValueError unless damping is valid and a `lora_pairs` group is made of pairs."""
    if not group["damping"] >= 0:
        raise ValueError(f"damping must be >= 0, got {group['damping']}")
    if not group["lora_pairs"]:
        return
    params = group["params"]
    if len(params) % 2:
        raise ValueError(f"lora_pairs needs lora_A, lora_B in turn, got {len(params)} parameters")
    for i, (a, b) in enumerate(zip(params[::2], params[1::2], strict=True)):
        shapes = f"lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)}"
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"lora_pairs, pair {i}: factors must be matrices, got {shapes}")
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"lora_pairs, pair {i}: expected lora_A (r, n) and lora_B (m, r), got {shapes}"
            )
