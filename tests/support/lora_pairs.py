"""LoRA pairs with gradients, and the textbook form of preconditioned AdamW."""

import torch
from torch import nn

# (m, n, r): two of one shape, a transposed one, another rank.
SHAPES = [(12, 20, 4), (12, 20, 4), (20, 12, 4), (9, 15, 8)]


def make_pairs(shapes=SHAPES, dtype=torch.float32, scale=1.0):
    """Return lora_A_0, lora_B_0, lora_A_1, ... with random gradients."""
    params = []
    for m, n, r in shapes:
        for shape in ((r, n), (m, r)):
            params.append(nn.Parameter((scale * torch.randn(shape)).to(dtype)))
    set_grads(params)
    return params


def set_grads(params, seed=1):
    """Set random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        # Autograd leaves gradients in the memory layout of their parameter.
        p.grad = torch.empty_like(p.detach()).copy_(grad)


def pair_group(params, **options):
    """Return a parameter group of pairs."""
    return {"params": params, "lora_pairs": True, **options}


def textbook(a, b, g_a, g_b, damping, relative=0.0):
    """Return P_A and P_B by explicit inverses, one pair at a time, float64."""
    a, b, g_a, g_b = (t.detach().double() for t in (a, b, g_a, g_b))

    def inverse(gram):
        added = damping + relative * torch.linalg.eigvalsh(gram).mean()
        return torch.linalg.inv(gram + added * torch.eye(len(gram), dtype=torch.float64))

    return inverse(b.T @ b) @ g_a, g_b @ inverse(a @ a.T)


class TextbookAdamW:
    """The equations of preconditioned AdamW, in float64, pair by pair; `damping` is that of each pair."""

    def __init__(
        self, params, lr, *damping, relative=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    ):
        self.p = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in self.p]
        self.v = [torch.zeros_like(p) for p in self.p]
        self.lr, self.betas, self.eps, self.relative = lr, betas, eps, relative
        self.damping = damping if len(damping) > 1 else damping * (len(params) // 2)
        self.weight_decay, self.t = weight_decay, 0

    def step(self, grads):
        """Take one step on raw gradients."""
        self.t += 1
        pairs = zip(self.p[::2], self.p[1::2], grads[::2], grads[1::2], self.damping, strict=True)
        directions = [direction for pair in pairs for direction in textbook(*pair, self.relative)]
        beta1, beta2 = self.betas
        for p, g, m, v in zip(self.p, directions, self.m, self.v, strict=True):
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            m_hat, v_hat = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
            p.sub_(self.lr * self.weight_decay * p)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))
