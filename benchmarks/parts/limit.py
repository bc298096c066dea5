"""How near a training step comes to what its matrix products alone would take here."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1}
"""Matrix products, and which argument is their first factor."""
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
"""Fused attention, and which argument holds the queries. Products: two forward, five backward."""
REPEATS = 3


class Products(TorchDispatchMode):
    """Count the matrix products of a stretch of code by what they are given: shapes, strides and types."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a product and compute it."""
        if func.overloadpacket in PRODUCTS or func.overloadpacket in ATTENTION:
            given = tuple(sorted((kwargs or {}).items(), key=lambda item: item[0]))
            described = tuple((name, describe(value)) for name, value in given)
            self.calls[func, tuple(map(describe, args)), described] += 1
        return func(*args, **(kwargs or {}))


def describe(value: Any) -> Any:
    """Return what makes a tensor like this one; anything else as it is."""
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.stride(), value.dtype
    return tuple(value) if isinstance(value, list) else value


def make(described: Any) -> Any:
    """Return a tensor as `describe` says, with random numbers."""
    if isinstance(described, tuple) and described and described[0] is Tensor:
        _, shape, stride, dtype = described
        # Of an expanded tensor, several elements are one number.
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        return torch.randn(size, dtype=dtype).as_strided(shape, stride)
    return described


def operations(func: Any, args: tuple[Any, ...]) -> int:
    """Return the floating-point operations of a product: two for each multiplication and addition."""
    packet = func.overloadpacket
    if packet in PRODUCTS:
        (_, left, *_), (_, right, *_) = args[PRODUCTS[packet] :][:2]
        return 2 * torch.Size(left).numel() * right[-1]
    backward = ATTENTION[packet]
    (_, query, *_), (_, key, *_) = args[backward:][:2]
    return (10 if backward else 4) * torch.Size(query).numel() * key[-2]


def fastest(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest of a few runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


@torch.no_grad()
def time_products(calls: Counter[Any]) -> float:
    """Return the CPU seconds that the counted products take by themselves."""
    total = 0.0
    for (func, args, given), count in calls.items():
        tensors = tuple(map(make, args))
        kwargs = {name: make(value) for name, value in given}
        total += count * fastest(lambda f=func, t=tensors, k=kwargs: f(*t, **k))
    return total


def print_limit(module: Any, batch: Any) -> None:
    """Print a batch's forward and backward pass beside its matrix products by themselves.

    Args:
        module: A LoraModule.
        batch: A batch of its.
    """

    def step() -> None:
        module.training_step(batch, 0).backward()
        module.zero_grad()

    seconds = fastest(step)
    with Products() as products:
        step()
    product_seconds = time_products(products.calls)
    count = sum(operations(func, args) * n for (func, args, _), n in products.calls.items())
    print(
        f"forward and backward: {seconds:.2f} CPU s, {count / 1e9:.0f} billion operations in "
        f"{sum(products.calls.values())} products, {count / seconds / 1e9:.1f} billion a second\n"
        f"the same products by themselves: {product_seconds:.2f} CPU s, "
        f"{count / product_seconds / 1e9:.1f} billion a second\n"
        f"the pass takes {seconds / product_seconds:.2f} times as long as its products"
    )
