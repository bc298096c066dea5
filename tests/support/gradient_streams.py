"""Streams of (x, delta) whose gradient has a known spectrum, and sketches of them."""

import torch

from app.initialization.gradient_sketch import RandomColumns, SketchedGradient

CPU = torch.device("cpu")
RANK = 4


def stream(m, n, spectrum, batches, tokens, seed=0, sparse=False):
    """Return micro-batches of (x, delta) whose sum of delta^T x has about the given decay."""
    g = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    out = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    into = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]
    if sparse:
        into = torch.eye(n, dtype=torch.float64)[:, torch.randperm(n, generator=g)[:k]]
    root = torch.tensor(spectrum, dtype=torch.float64).sqrt()
    pairs = []
    for _ in range(batches):
        # Each token is a few directions at random strengths; shared signs make the sum coherent.
        coefficient = torch.randn(tokens, k, generator=g, dtype=torch.float64)
        other = coefficient + 0.3 * torch.randn(tokens, k, generator=g, dtype=torch.float64)
        pairs.append((coefficient * root @ into.T, other * root @ out.T))
    return [(x.float(), delta.float()) for x, delta in pairs]


def gradient(pairs):
    return sum(delta.double().T @ x.double() for x, delta in pairs)


def best(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def product(svd, rank=None):
    return (svd.U[:, :rank] * svd.S[:rank] @ svd.V[:, :rank].T).double()


def sketched(pairs, width, passes=1, seed=0, m=None, n=None):
    m, n = m or pairs[0][1].shape[1], n or pairs[0][0].shape[1]
    accumulator = SketchedGradient(m, n, width, RandomColumns(CPU, seed))
    for number in range(passes):
        if number:
            accumulator.next_pass()
        for x, delta in pairs:
            accumulator.update(x, delta)
    return accumulator


def relative(matrix, wanted):
    return float((matrix - wanted).norm() / wanted.norm())


def decaying(count, base=0.7):
    return [base**i for i in range(count)]
