"""A LoRA pair on a regression in float64, on which optimizers of pairs are held against plain loops."""

import numpy as np
import torch

M, N, R, S = 7, 9, 3, 2.5
"""Shape of the weight (m, n), the rank, and the scaling."""


def random_pairs(pairs=1, seed=0):
    """Return stacks of lora_A (P, r, n), lora_B (P, m, r) and full gradients (P, m, n), in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((R, N), (M, R), (M, N))
    return tuple(
        torch.randn(pairs, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


class Regression:
    """|W X - Y|^2 of a layer W = s B A, with its factors' gradients by autograd."""

    def __init__(self, seed=5):
        generator = torch.Generator().manual_seed(seed)
        self.X, self.Y = (
            torch.randn(size, 20, generator=generator, dtype=torch.float64) for size in (N, M)
        )

    def loss(self, A, B):
        return ((S * B @ A @ self.X - self.Y) ** 2).mean()

    def gradients(self, A, B):
        """Return the gradients of numpy factors, in numpy."""
        A, B = (torch.tensor(x, requires_grad=True) for x in (A, B))
        return [g.numpy() for g in torch.autograd.grad(self.loss(A, B), (A, B))]


def group(params):
    """Return a parameter group of pairs with the regression's scaling."""
    return {"params": params, "lora_pairs": True, "scaling": [S] * (len(params) // 2)}


def numpy_adam(betas, eps):
    """Return `adam(name, g, t)`, the update of Adam's step t, from 1, on a parameter's gradient."""
    (b1, b2), moments = betas, {}

    def adam(name, g, t):
        m, v = moments.get(name, (0.0, 0.0))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        moments[name] = m, v
        return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return adam
