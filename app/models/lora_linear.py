"""PEFT's LoRA layer with its product computed in one function: fewer passes, and an input saved once."""

import functools
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


class _WithProduct:
    """A LoRA layer of PEFT's on a frozen layer, computed by `LoraProduct` where that is the same.

    Parameters, their names and what is saved are PEFT's. So is the forward pass of anything but one plain,
    active and unmerged adapter on frozen weights (DoRA, a bias of lora_B, several adapters, hooks on the layer
    inside, ...).
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + bias + scaling * lora_B @ lora_A @ dropout(x), (..., n) to (..., m)."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if args or kwargs or self.disable_adapters or self.merged or name not in self.lora_A:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        base, lora_A, lora_B = self.base_layer, self.lora_A[name], self.lora_B[name]
        weight, bias = base.weight, base.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        hooked = any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in (base, lora_A, lora_B)
        )
        if trained or hooked or name in self.lora_variant or lora_B.bias is not None:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        y = None
        if isinstance(base, Conv1D):
            weight = weight.T
        elif not isinstance(self, LoraLinear):
            y, weight, bias = base(x), None, None
        return LoraProduct.apply(  # type: ignore[no-any-return]
            x, weight, bias, lora_A.weight, lora_B.weight, self.scaling[name], p, y
        )


class LoraLinear(_WithProduct, Linear):
    """PEFT's `Linear` with `LoraProduct`."""


@functools.cache
def _on_codes(kind: type) -> type:
    return type(f"Lora{kind.__name__}", (_WithProduct, kind), {})


def use_lora_product(model: nn.Module) -> None:
    """Let the LoRA layers of a PEFT model on plain and quantised linear layers compute by `LoraProduct`."""
    for module in model.modules():
        kind: Any = type(module)  # subclasses have products of their own
        if kind is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = LoraLinear
        elif kind.__module__ == "peft.tuners.lora.bnb":
            module.__class__ = _on_codes(kind)


class LoraProduct(torch.autograd.Function):
    """The product of a frozen linear layer and its LoRA factors.

        y = W x + bias + scaling * lora_B @ h,    h = lora_A @ dropout(x)

    The second product is added into the first one's memory. For the backward pass x is saved as it came, which
    layers of the same input share, and h; with dropout also a byte an entry that says which are kept. Types
    are those of PEFT's layer: y has the base layer's, the factors' part is computed in theirs, and autocast,
    where it is on, decides for both. PEFT rounds more often: after the product, the scaling and the sum.
    Where W is codes, W x + bias comes from their own product, whose gradient is its own, too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        p: float,
        y: Tensor | None = None,
    ) -> Tensor:
        """Compute y (..., m).

        Args:
            ctx: autograd's context.
            x: (..., n) input.
            weight: (m, n) frozen W, also a transposed view; None where y is given.
            bias: (m,) frozen.
            lora_A: (r, n).
            lora_B: (m, r).
            scaling: Factor of the second product.
            p: Probability of dropout.
            y: (..., m) W x + bias, which is left as it is.
        """
        device, dtype = x.device.type, lora_A.dtype
        given, frozen = x, weight
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
            weight = None if weight is None else weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if y is None:
            y = linear(x, weight, bias)  # type: ignore[arg-type]
        else:  # the other product's, which may have saved it
            y = y.clone(memory_format=torch.contiguous_format)
        x, kept = x.to(dtype), None
        if p:
            kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
            x, scaling = x * kept, scaling / (1 - p)
        # A product with a contiguous (n, r) is faster than one with the transposed view.
        h = x.reshape(-1, x.shape[-1]) @ lora_A.to(dtype).T.contiguous()
        flat, B = y.view(-1, y.shape[-1]), lora_B.to(dtype)
        if flat.dtype == dtype:
            flat.addmm_(h, B.T, alpha=scaling)
        else:
            flat.add_(h @ B.T, alpha=scaling)
        ctx.save_for_backward(given, frozen, lora_A, lora_B, h, kept)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, lora_A and lora_B from that of y.

        grad_h = scaling * grad @ lora_B;    grad_B = scaling * grad^T h;    grad_A = grad_h^T dropout(x)
        grad_x = grad @ W + dropout(grad_h @ lora_A)
        """
        given, weight, lora_A, lora_B, h, kept = ctx.saved_tensors
        wanted, dtype = ctx.needs_input_grad, h.dtype
        grad_x = grad_A = grad_B = None
        whole, grad = grad, grad.reshape(-1, grad.shape[-1])
        thin = grad.to(dtype)
        # But for the scaling, which is applied where it is not rounded.
        grad_h = thin @ lora_B.to(dtype)
        if wanted[4]:
            # (r, m) and then transposed: more than twice as fast as grad^T h.
            grad_B = (h.T @ thin).T.to(lora_B.dtype).mul_(ctx.scaling)
        if wanted[3]:
            x = given.to(dtype) if kept is None else given.to(dtype) * kept
            grad_A = (grad_h.T @ x.reshape(-1, x.shape[-1])).to(lora_A.dtype).mul_(ctx.scaling)
        if wanted[0]:
            A = lora_A.to(dtype)
            if weight is not None:
                grad_x = grad @ weight.to(grad.dtype)
            if grad_x is not None and kept is None and grad_x.dtype == dtype:
                grad_x.addmm_(grad_h, A, alpha=ctx.scaling)
            else:
                through_h = grad_h @ A
                if kept is not None:
                    through_h.mul_(kept.reshape(through_h.shape))
                if grad_x is None:
                    grad_x = through_h.mul_(ctx.scaling)
                else:
                    grad_x.add_(through_h, alpha=ctx.scaling)
            grad_x = grad_x.view(given.shape).to(given.dtype)
        return grad_x, None, None, grad_A, grad_B, None, None, whole if wanted[7] else None
