"""Precondition the gradients of many LoRA pairs (for `PreconditionedAdamW`), their r x r matrices in batches.

Shapes everywhere: `lora_A` (r, n), `lora_B` (m, r), weight update scaling * lora_B @ lora_A (m, n).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# A damping below this many roundings of a diagonal entry is inside the rounding error of the Gram
# matrix itself, which is summed in the factors' precision (float32 at least) and factored in float64.
_ROUNDINGS = 8

Kind = Literal["lora_A", "lora_B"]
Gradients = Sequence[Tensor | None]
Cache = dict[Any, Any]  # "plan", and scratch memory by use and shape


class _Job(NamedTuple):
    """Equal-shaped gradients of one kind that are preconditioned together."""

    grad_of: Kind
    pairs: list[int]


def gram_matrices(factors: list[Tensor], kind: Kind, cache: Cache) -> Tensor:
    """Stack lora_A @ lora_A^T or lora_B^T @ lora_B of P equal-shaped factors: (P, r, r).

    The result has the factors' dtype, float32 at least. A function of its own because it is a sum
    over n (or m): with sharded factors an all-reduce of its result belongs between it and
    `damped_inverse`.
    """
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    if len(factors) == 1 and factors[0].dtype == wide:
        factor = factors[0]
        gram = factor @ factor.T if kind == "lora_A" else factor.T @ factor
        return gram[None]
    stacked = _stack(factors, wide, cache)
    return stacked @ stacked.mT if kind == "lora_A" else stacked.mT @ stacked


def damped_inverse(
    gram: Tensor, damping: float, relative_damping: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Invert positive semi-definite matrices after adding damping to their diagonals.

        lambda  = damping + relative_damping * tr(gram) / r
        inverse = (gram + lambda I)^-1 = L^-T L^-1,   L L^T = gram + lambda I

    With damping > 0 nothing fails and nothing waits for the GPU: where lambda is below the
    rounding error of a diagonal entry (1e-6 of it in float32), that error takes its place, so that
    the Cholesky factorisation of a finite matrix succeeds. With damping == 0 the matrices are used
    as they are, relative_damping must be 0, and singular means that a pivot is all rounding error.

    `gram` is (P, r, r), float32 or float64, and not modified; tr(gram) / r is its mean eigenvalue.
    Returned are the inverses in float64 and None or, if damping == 0, a bool tensor (P,) that marks
    the singular matrices, whose inverses are meaningless. What is not finite stays so, without an
    error.

    Source: arXiv:2402.02347. Differs: no identity in place of an inverse that fails; damping in
    units of the matrix.
    """
    noise = _ROUNDINGS * torch.finfo(gram.dtype).eps
    gram = gram.double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if damping > 0:
        added = damping + relative_damping * diagonal.mean(-1, keepdim=True)
        gram = gram + torch.diag_embed(torch.maximum(noise * diagonal, added))
    # check_errors=False: reading the status on the host would stall the GPU at every step.
    lower, info = torch.linalg.cholesky_ex(gram, check_errors=False)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    root = torch.linalg.solve_triangular(lower, eye, upper=False)
    if damping > 0:
        return root.mT @ root, None
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    failed = (info > 0) | (pivots <= noise * diagonal).any(-1)
    return root.mT @ root, failed & diagonal.isfinite().all(-1)


@torch.no_grad()
def precondition_pairs(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    grad_A: Gradients,
    grad_B: Gradients,
    damping: float,
    cache: Cache | None = None,
    relative_damping: float = 0.0,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Precondition the gradients of many LoRA pairs, each by the Gram matrix of the other factor.

        P_A = (lora_B^T lora_B + lambda I)^-1 grad_A      lambda = damping
        P_B = grad_B (lora_A lora_A^T + lambda I)^-1               + relative_damping * mean eigenvalue

    Args:
        lora_A: One tensor (r, n) a pair; r, n, dtype and device may differ from pair to pair.
        lora_B: One tensor (m, r) a pair. Neither factor is modified.
        grad_A: Gradients like `lora_A`, or None where there is none. Not modified.
        grad_B: Gradients like `lora_B`, or None where there is none. Not modified.
        damping: Number added to the diagonal of each Gram matrix, >= 0.
        cache: A dict to keep between calls whose tensors agree in shape, dtype, device and places
            of None; results are then overwritten by the next call.
        relative_damping: Multiple of each one's mean eigenvalue, likewise; above 0 with damping > 0 only.

    Returns:
        P_A and P_B, lists like `grad_A` and `grad_B` with None in the same places, in the dtype
        of each gradient and the memory layout of each factor. The product is taken in float32, or
        in the gradient's dtype if that is wider. Gradients that are not finite stay so.

    Raises:
        RuntimeError: damping is 0 and a Gram matrix that is needed is singular.

    Source: arXiv:2402.02347; arXiv:2502.01235, eq. 9. Differs: damping; both from the old factors
    (the authors' code updates lora_A before it looks at it for lora_B).
    """
    factors = {"lora_A": lora_A, "lora_B": lora_B}
    grads = {"lora_A": grad_A, "lora_B": grad_B}
    other: dict[Kind, Kind] = {"lora_A": "lora_B", "lora_B": "lora_A"}
    results: dict[str, list[Tensor | None]] = {k: [None] * len(g) for k, g in grads.items()}
    cache = {} if cache is None else cache
    if "plan" not in cache:
        cache["plan"] = _plan(lora_A, lora_B, grad_A, grad_B)
    for jobs in cache["plan"]:
        grams = []
        for grad_of, pairs in jobs:
            kind = other[grad_of]
            grams.append(gram_matrices([factors[kind][i] for i in pairs], kind, cache))
        inverses, singular = damped_inverse(torch.cat(grams), damping, relative_damping)
        if singular is not None and bool(singular.any()):
            raise RuntimeError(_singular_message(jobs, int(singular.nonzero()[0, 0])))
        sizes = [len(job.pairs) for job in jobs]
        first = next(g for i in jobs[0].pairs if (g := grads[jobs[0].grad_of][i]) is not None)
        inverses = inverses.to(torch.promote_types(first.dtype, torch.float32))
        for (grad_of, pairs), inverse in zip(jobs, inverses.split(sizes), strict=True):
            raw = [g for i in pairs if (g := grads[grad_of][i]) is not None]
            done = _apply(inverse, raw, grad_of, (grad_of, pairs[0]), cache)
            for i, grad in zip(pairs, done, strict=True):
                factor = factors[grad_of][i]
                results[grad_of][i] = _laid_out_like(factor, grad)
    return results["lora_A"], results["lora_B"]


def _laid_out_like(factor: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient in the memory layout of its factor.

    Fused kernels walk parameter and gradient in memory order without looking at strides.
    """
    if factor.is_contiguous():
        return grad
    return torch.empty_like(factor, dtype=grad.dtype).copy_(grad)


def _singular_message(jobs: Sequence[_Job], index: int) -> str:
    grad_of, pair = [(job.grad_of, i) for job in jobs for i in job.pairs][index]
    product = "lora_B^T lora_B" if grad_of == "lora_A" else "lora_A lora_A^T"
    return (
        f"pair {pair}: {product} is singular, so the gradient of {grad_of} cannot be preconditioned with "
        "damping 0; set damping > 0 (LoRA's initialization has lora_B = 0)"
    )


def _apply(
    inverse: Tensor, raw: list[Tensor], grad_of: Kind, key: Any, cache: Cache
) -> Sequence[Tensor]:
    """Multiply each gradient by its inverse, from the left for lora_A and from the right for lora_B."""
    dtype = inverse.dtype
    if len(raw) == 1 and raw[0].dtype == dtype:
        # Without a stack: on CPU `mm` is faster than a batch of one, and a view costs a microsecond.
        (grad,) = raw
        out = _buffer(key, grad.shape, dtype, grad, cache)
        left, right = (inverse[0], grad) if grad_of == "lora_A" else (grad, inverse[0])
        return [torch.mm(left, right, out=out)]
    wide = _stack(raw, dtype, cache)
    out = _buffer(key, wide.shape, dtype, wide, cache)
    left, right = (inverse, wide) if grad_of == "lora_A" else (wide, inverse)
    return torch.bmm(left, right, out=out).to(raw[0].dtype).unbind()


def _plan(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], grad_A: Gradients, grad_B: Gradients
) -> list[list[_Job]]:
    """Group the gradients that share a stack; one list of jobs for each (device, rank, dtype)."""
    stacks: dict[tuple[Any, ...], list[int]] = {}
    for i, (a, b, g_a, g_b) in enumerate(zip(lora_A, lora_B, grad_A, grad_B, strict=True)):
        for grad_of, grad, factor in (("lora_A", g_a, b), ("lora_B", g_b, a)):
            if grad is not None:
                key = (grad_of, a.shape, b.shape, factor.dtype, grad.dtype, a.device)
                stacks.setdefault(key, []).append(i)
    plan: dict[tuple[torch.device, int, torch.dtype], list[_Job]] = {}
    for (grad_of, a_shape, b_shape, _, dtype, device), pairs in stacks.items():
        numel = max(a_shape.numel(), b_shape.numel(), 1)
        # A GPU wants few launches. A CPU wants stacks that stay in its cache, and gains nothing
        # from copying a large matrix into one.
        if device.type == "cpu":
            size = 2**17 // numel if numel < 2**14 else 1
        else:
            size = max(1, 2**24 // numel)
        jobs = [_Job(grad_of, pairs[start : start + size]) for start in range(0, len(pairs), size)]
        plan.setdefault((device, a_shape[0], dtype), []).extend(jobs)
    return list(plan.values())


def _buffer(key: Any, shape: torch.Size, dtype: torch.dtype, like: Tensor, cache: Cache) -> Tensor:
    """Return uninitialized memory, on CPU the same at every step: fresh pages are slow there."""
    if like.device.type != "cpu":  # a GPU's allocator keeps its memory by itself
        return like.new_empty(shape, dtype=dtype)
    key = (key, shape, dtype)
    if key not in cache:
        cache[key] = like.new_empty(shape, dtype=dtype)
    return cache[key]


def _stack(tensors: list[Tensor], dtype: torch.dtype, cache: Cache) -> Tensor:
    """Stack tensors of one shape and dtype in a wider dtype."""
    shape = torch.Size((len(tensors), *tensors[0].shape))
    stacked = _buffer("stack", shape, dtype, tensors[0], cache)
    if tensors[0].dtype == dtype:
        return torch.stack(tensors, out=stacked)
    return stacked.copy_(torch.stack(tensors))
