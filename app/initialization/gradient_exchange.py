"""Whose layer is whose, and how every process gets what the owners have."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from app.distributed.collectives import global_rank, world_size
from app.initialization.gradient_estimators import GradientEstimate
from app.initialization.svd import SVD

BUCKET_NUMBERS = 2**24
"""Float32 numbers that are summed over processes together: 64 MiB, or one layer if that is larger."""


class Layer(NamedTuple):
    """A layer's name and the shape (m, n) of its gradient."""

    name: str
    m: int
    n: int


class Sender(Protocol):
    """Who sends: where its tensors live, and how much it has sent."""

    sent_bytes: int
    device: torch.device


def assign_buckets(layers: Sequence[Layer], processes: int) -> list[tuple[int, list[Layer]]]:
    """Group neighbouring layers, last first as the backward pass meets them, and give each an owner."""
    groups: list[list[Layer]] = []
    share = sum(m * n for _, m, n in layers) // processes
    limit = min(BUCKET_NUMBERS, max(share, 1))
    size = limit
    for layer in reversed(layers):
        if size + layer.m * layer.n > limit:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += layer.m * layer.n
    loads = [0] * processes
    owned = []
    for group in groups:
        owner = loads.index(min(loads))
        loads[owner] += sum(m * n for _, m, n in group)
        owned.append((owner, group))
    return owned


def assign_owners(layers: Sequence[Layer], processes: int) -> dict[str, int]:
    """Spread layers over processes by m + n, which the cost of merging and sending a sketch follows."""
    loads = [0] * processes
    owners = {}
    for layer in layers:
        owners[layer.name] = loads.index(min(loads))
        loads[owners[layer.name]] += layer.m + layer.n
    return owners


def unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Cut a flat buffer into tensors of these shapes."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def from_owners(
    tensors: list[list[Tensor]],
    names: Sequence[str],
    owners: dict[str, int],
    store: Sender,
) -> list[list[Tensor]]:
    """Give every process the owners' tensors, in one gather of flat buffers.

    Args:
        tensors: For each name its tensors; only the owner's values matter, everybody's shapes agree.
        names: The layers, in the same order everywhere.
        owners: Who owns which.
        store: Counts the bytes.
    """
    shapes = [[t.shape for t in group] for group in tensors]
    sizes = [0] * world_size()
    for name, group in zip(names, shapes, strict=True):
        sizes[owners[name]] += sum(shape.numel() for shape in group)
    flat = torch.zeros(max(sizes), device=store.device)
    mine = [
        t.reshape(-1).float()
        for n, g in zip(names, tensors, strict=True)
        if owners[n] == global_rank()
        for t in g
    ]
    if mine:
        own = torch.cat(mine)
        flat[: len(own)] = own
    gathered = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(gathered, flat)
    store.sent_bytes += flat.nbytes * (world_size() - 1)
    at = [0] * world_size()
    result = []
    for name, group in zip(names, shapes, strict=True):
        owner, parts = owners[name], []
        for shape in group:
            parts.append(gathered[owner][at[owner] : at[owner] + shape.numel()].view(shape))
            at[owner] += shape.numel()
        result.append(parts)
    return result


def share_estimates(
    mine: dict[str, GradientEstimate],
    layers: Sequence[Layer],
    owners: dict[str, int],
    widths: Mapping[str, int],
    store: Sender,
) -> dict[str, GradientEstimate]:
    """Give every process all estimates."""
    if world_size() == 1:
        return {layer.name: mine[layer.name] for layer in layers}
    tensors = []
    for name, m, n in layers:
        if name in mine:
            e = mine[name]
            numbers = [e.norm, e.captured_energy, e.rank_error]
            told = torch.tensor(numbers, dtype=torch.float32, device=store.device)
            tensors.append([*e.svd, told])
        else:
            k = widths[name]
            shapes = ((m, k), (k,), (n, k), (3,))
            tensors.append([torch.empty(shape, device="meta") for shape in shapes])
    names = [layer.name for layer in layers]
    shared = from_owners(tensors, names, owners, store)
    return {
        name: GradientEstimate(SVD(U, S, V), *told.tolist())
        for name, (U, S, V, told) in zip(names, shared, strict=True)
    }
