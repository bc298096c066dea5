"""The cross-entropy of an LM head in chunks of positions, each with its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

CHUNK_BYTES = 64 << 20
"""Least size of a chunk's float32 logits."""


class LogitsTail(TorchFunctionMode):
    """Record what a model does with its LM head's output, such as soft-capping, to do it with other logits.

    Set `value` to the head's output, and enter: each function of it, or of what became of it, is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None
        self._calls: list[Callable[[Tensor], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, and record it if it is one of the logits."""
        options = kwargs or {}
        result = func(*args, **options)
        places = [i for i, argument in enumerate(args) if argument is self.value]
        if places:

            def call(logits: Tensor) -> Any:
                return func(*(logits if i in places else a for i, a in enumerate(args)), **options)

            self._calls.append(call)
            if isinstance(result, Tensor):
                self.value = result
        return result

    def check(self, logits: Tensor) -> None:
        """Raise RuntimeError unless the model's logits are what was recorded."""
        if logits is not self.value:
            raise RuntimeError(
                "the logits of this model are not a chain of functions of its LM head's output: "
                "the loss cannot be computed in chunks"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """Do with an LM head's output (..., vocabulary) what was recorded."""
        for call in self._calls:
            result = call(logits)
            logits = result if isinstance(result, Tensor) else logits
        return logits


class ChunkedLoss(torch.autograd.Function):
    """The weighted cross-entropy of logits = tail(head(hidden)), whose gradient is made in the forward pass.

        loss = sum_s w_s (logsumexp(z_s) - z_s[label_s]),    dloss/dz_s = w_s (softmax(z_s) - onehot(label_s))

    A chunk's logits are freed with it: what is kept is the gradient of `hidden` and of the head's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        tail: Callable[[Tensor], Tensor],
        vocabulary: int,
        labels: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        *trained: nn.Parameter,
    ) -> Tensor:
        """Compute the loss, a float32 scalar.

        Args:
            ctx: autograd's context.
            head: The LM head, from (1, positions, n) to logits.
            tail: What the architecture does with its output.
            vocabulary: Logits of a position.
            labels: (S,) tokens to predict.
            weights: (S,) float32 weights w of the positions; None where all are 1.
            hidden: (S, n) the head's input.
            trained: The head's parameters that require a gradient.
        """
        loss = torch.zeros((), device=hidden.device)
        through = ctx.needs_input_grad[5]
        grad_hidden = torch.empty_like(hidden) if through else None
        sums: list[Tensor | None] = [None for _ in trained]
        rows = chunk_size(head, vocabulary)
        for start in range(0, len(labels), rows):
            part = hidden[start : start + rows].detach().requires_grad_(through)
            inputs = [part, *trained] if through else [*trained]
            with torch.enable_grad():
                logits = tail(head(part.unsqueeze(0)))[0]
            chosen = slice(start, start + rows)
            weight = None if weights is None else weights[chosen, None]
            added, slope = _loss_and_slope(logits, labels[chosen, None], weight)
            loss += added
            if not inputs:
                continue
            with torch.autocast(hidden.device.type, enabled=False):
                grads = list(torch.autograd.grad(logits, inputs, slope))
            del logits, slope  # before the next chunk's
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grads.pop(0)
            for i, grad in enumerate(grads):
                total = sums[i]
                # In float32 over the chunks, whatever the parameter's type.
                sums[i] = grad.float() if total is None else total.add_(grad)
        ctx.save_for_backward(
            grad_hidden,
            # Of no positions it is zero, not missing: processes sum their gradients in one buffer.
            *(
                torch.zeros_like(p) if s is None else s.to(p.dtype)
                for s, p in zip(sums, trained, strict=True)
            ),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply what the forward pass has made by the loss's gradient, in place."""
        made = (None if g is None else g.mul_(grad) for g in ctx.saved_tensors)
        return None, None, None, None, None, *made


def chunk_size(head: nn.Module, vocabulary: int) -> int:
    """Return the positions of a chunk.

    Each chunk reads the head's weights, and makes the gradient of those that are trained anew: its float32
    logits have `CHUNK_BYTES`, and not less than a quarter of the one or all of the other.
    """
    read = sum(p.numel() * p.element_size() for p in head.parameters())
    made = sum(4 * p.numel() for p in head.parameters() if p.requires_grad)
    return max(1, max(CHUNK_BYTES, read // 4, made) // (4 * vocabulary))


def _loss_and_slope(
    logits: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient (C, vocabulary), of the logits' type; labels, weights are (C, 1)."""
    scores = torch.log_softmax(logits.detach().float(), dim=-1)
    picked = scores.gather(1, labels)
    loss = -(picked if weights is None else picked * weights).sum()
    slope = scores.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=scores.dtype))
    if weights is not None:
        slope.mul_(weights)
    return loss, slope.to(logits.dtype)
