"""Assign layers to processes, and send every process what their owners hold."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from app.distributed.processes import global_rank, world_size
from app.initialization.factors import SVD
from app.initialization.gradient_estimators import GradientEstimate

# Float32 numbers that are summed over processes together: 64 MiB, or one layer if that is larger.
BUCKET_NUMBERS = 2**24


class Layer(NamedTuple):
    """A layer's name and the shape (m, n) of its gradient."""

    name: str
    m: int
    n: int


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
    """Split a flat buffer into tensors of these shapes."""
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def broadcast_from_owners(
    tensors: Mapping[str, Sequence[Tensor]], owners: Mapping[str, int]
) -> int:
    """Overwrite each layer's float32 tensors by its owner's, with one flat broadcast for each owner.

    All processes give tensors of the same shapes in the same order. Returns the bytes that this one has sent.
    """
    sent_bytes = 0
    for owner in range(world_size()):
        group = [t for name, parts in tensors.items() if owners[name] == owner for t in parts]
        if not group:
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.broadcast(flat, owner)
        if owner == global_rank():
            sent_bytes += flat.nbytes * (world_size() - 1)
        for tensor, part in zip(group, unpack(flat, [t.shape for t in group]), strict=True):
            tensor.copy_(part)
    return sent_bytes


def share_estimates(
    own: Mapping[str, GradientEstimate],
    shapes: Mapping[str, tuple[int, int, int]],
    owners: Mapping[str, int],
    device: torch.device,
) -> tuple[dict[str, GradientEstimate], int]:
    """Return all layers' estimates on every process, and the bytes that this one has sent.

    `own` are those of the layers that this process owns; `shapes` has m, n and the number of triplets k of all.
    """
    if world_size() == 1:
        return dict(own), 0
    tensors = {}
    for name, (m, n, k) in shapes.items():
        if name in own:
            estimate = own[name]
            numbers = [estimate.norm, estimate.captured_energy, estimate.rank_error]
            tensors[name] = [*estimate.svd, torch.tensor(numbers, device=device)]
        else:
            tensors[name] = [
                torch.empty(shape, device=device) for shape in ((m, k), (k,), (n, k), (3,))
            ]
    sent_bytes = broadcast_from_owners(tensors, owners)
    shared = {
        name: GradientEstimate(SVD(U, S, V), *numbers.tolist())
        for name, (U, S, V, numbers) in tensors.items()
    }
    return shared, sent_bytes
