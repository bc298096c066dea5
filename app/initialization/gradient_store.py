"""Keep every layer's gradient while it is observed, on one process or spread over many.

Several processes each see their share of the samples. A layer has one owner, the process that in the
end holds its sum over all processes and decomposes it; then everybody gets every layer's estimate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from app.distributed.collectives import (
    global_rank,
    largest_over_processes,
    raise_on_all_ranks,
    world_size,
)
from app.initialization.gradient_estimators import (
    ExactGradient,
    GradientEstimate,
    SketchedGradient,
    extremes,
)
from app.initialization.gradient_exchange import (
    Layer,
    assign_buckets,
    assign_owners,
    from_owners,
    share_estimates,
    unpack,
)
from app.utils.errors import InputError


class GradientStore(Protocol):
    """Takes the (x, delta) stream of all layers, over one or more passes through the same samples."""

    sent_bytes: int

    def update(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x to a layer; finite only if x and delta are."""

    def end_batch(self) -> None:
        """Finish a micro-batch; every process does so equally often."""

    def next_pass(self) -> None:
        """Prepare for one more pass over the same samples."""

    def estimates(self, ranks: Mapping[str, int], scale: float) -> dict[str, GradientEstimate]:
        """Return all layers' estimates, the same on every process.

        Args:
            ranks: Triplets wanted of each layer.
            scale: Factor of all gradients.

        Raises:
            InputError: On every process, if a layer's gradient cannot be decomposed.
        """


class ExactStore:
    """The whole gradient of each layer, float32, on one process only: its owner.

    Neighbouring layers form buckets. A bucket of products delta^T x is summed to its owner as soon as
    the backward pass has been through its layers, so that a process holds its own sums and the buckets
    under way, and never all gradients.

    Processes may reach different layers (a mixture of experts), in another order, or more than once.
    They agree without a word: in every micro-batch each process sends every bucket once, in the order
    of the buckets, empty ones too; what enters a bucket afterwards waits for the next micro-batch.

    Args:
        layers: The layers in module order, the same on every process.
        device: Where sums live.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.device = device
        self.sent_bytes = 0
        self.buckets = assign_buckets(layers, world_size())
        self.bucket_of = {
            layer.name: i for i, (_, members) in enumerate(self.buckets) for layer in members
        }
        self.sums = {
            layer.name: ExactGradient(layer.m, layer.n, device)
            for owner, members in self.buckets
            if owner == global_rank()
            for layer in members
        }
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._flat: dict[int, Tensor] = {}
        self._start_batch()

    def _start_batch(self) -> None:
        self._next = 0  # the bucket that is sent next
        self._waiting = [{layer.name for layer in members} for _, members in self.buckets]

    def update(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """Add delta^T x, here or, with several processes, to the bucket under way."""
        if world_size() == 1:
            return self.sums[name].update(x, delta)
        bucket = self.bucket_of[name]
        if bucket not in self._staged:
            self._stage(bucket)
        x, delta = x.float(), delta.float()
        self._staged[bucket][name].addmm_(delta.T, x)
        self._waiting[bucket].discard(name)
        while self._next < len(self.buckets) and not self._waiting[self._next]:
            self._send(self._next)
            self._next += 1
        return extremes(x, delta)

    def _stage(self, bucket: int) -> None:
        members = self.buckets[bucket][1]
        flat = torch.zeros(sum(m * n for _, m, n in members), device=self.device)
        parts = flat.split([m * n for _, m, n in members])
        self._flat[bucket] = flat
        self._staged[bucket] = {
            layer.name: part.view(layer.m, layer.n)
            for layer, part in zip(members, parts, strict=True)
        }

    def _send(self, bucket: int) -> None:
        if bucket not in self._staged:
            self._stage(bucket)
        owner, staged = self.buckets[bucket][0], self._staged.pop(bucket)
        flat = self._flat.pop(bucket)
        dist.reduce(flat, dst=owner)
        if owner == global_rank():
            for name, part in staged.items():
                self.sums[name].total += part
        else:
            self.sent_bytes += flat.nbytes

    def end_batch(self) -> None:
        """Send the buckets that the backward pass left incomplete."""
        if world_size() > 1:
            for bucket in range(self._next, len(self.buckets)):
                self._send(bucket)
            self._start_batch()

    def next_pass(self) -> None:
        """Refuse: one pass is already exact."""
        raise RuntimeError("the exact estimator needs one pass")

    def estimates(self, ranks: Mapping[str, int], scale: float) -> dict[str, GradientEstimate]:
        """Decompose the own layers and share the results."""
        if largest_over_processes(len(self._staged), self.device):
            self.end_batch()  # what entered buckets late in the last one
        mine = raise_on_all_ranks(lambda: _decompose(self.sums, ranks, scale))
        owners = {layer.name: owner for owner, members in self.buckets for layer in members}
        return share_estimates(mine, list(self.layers.values()), owners, ranks, self)


class SketchStore:
    """A sketch of each layer on every process, of its own samples; merged by the layer's owner.

    Args:
        layers: The layers in module order, the same on every process.
        widths: Columns of each layer's sketch.
        device: Where sketches live.
        generator: Makes a layer's generator from its name, the same on every process: the probes have to
            agree.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        widths: Mapping[str, int],
        device: torch.device,
        generator: Callable[[str], torch.Generator],
    ) -> None:
        self.layers = list(layers)
        self.device = device
        self.sent_bytes = 0
        self.kept = {
            layer.name: SketchedGradient(
                layer.m, layer.n, widths[layer.name], device, generator(layer.name)
            )
            for layer in layers
        }
        self.owners = assign_owners(layers, world_size())

    def update(self, name: str, x: Tensor, delta: Tensor) -> Tensor:
        """Take one micro-batch of (x, delta) into the layer's sketch."""
        return self.kept[name].update(x, delta)

    def end_batch(self) -> None:
        """Do nothing: the processes meet after a pass."""

    def next_pass(self) -> None:
        """Give every process the merged sketches, and start the next half step from them."""
        if world_size() > 1:
            self._merge()
            names = [layer.name for layer in self.layers]
            owned = [[self.kept[n].left, self.kept[n].right] for n in names]
            for parts, name in zip(
                from_owners(owned, names, self.owners, self), names, strict=True
            ):
                self.kept[name].left, self.kept[name].right = parts
        for accumulator in self.kept.values():
            accumulator.next_pass()

    def _merge(self) -> None:
        """Send each layer's sketches to its owner, who adds them up."""
        names = [layer.name for layer in self.layers]
        per_owner = [[n for n in names if self.owners[n] == o] for o in range(world_size())]
        packed = [
            torch.cat([t.reshape(-1) for n in group for t in self.kept[n].partial()])
            if group
            else torch.empty(0, device=self.device)
            for group in per_owner
        ]
        mine = {name: self.kept[name] for name in per_owner[global_rank()]}
        size = packed[global_rank()].numel()
        received = torch.empty(size * world_size(), device=self.device)
        dist.all_to_all_single(
            received, torch.cat(packed), [size] * world_size(), [p.numel() for p in packed]
        )
        self.sent_bytes += 4 * sum(p.numel() for o, p in enumerate(packed) if o != global_rank())
        raise_on_all_ranks(lambda: _add_up(mine, received))

    def estimates(self, ranks: Mapping[str, int], scale: float) -> dict[str, GradientEstimate]:
        """Merge, decompose the own layers and share the results."""
        if world_size() > 1:
            self._merge()
        own = {
            name: found for name, found in self.kept.items() if self.owners[name] == global_rank()
        }
        mine = raise_on_all_ranks(lambda: _decompose(own, ranks, scale))
        widths = {name: found.left.shape[1] for name, found in self.kept.items()}
        return share_estimates(mine, self.layers, self.owners, widths, self)


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            f"the gradient at {layer} cannot be decomposed ({str(error).splitlines()[0]}), though all inputs "
            "and output gradients were finite: their products overflow. Look at the initialisation rows "
            "and at the model's weights"
        ) from error


def _decompose(
    sums: Mapping[str, ExactGradient | SketchedGradient], ranks: Mapping[str, int], scale: float
) -> dict[str, GradientEstimate]:
    found = {}
    for name, gradient in sums.items():
        with _naming(name):
            found[name] = gradient.estimate(ranks[name], scale)
    return found


def _add_up(sketches: Mapping[str, SketchedGradient], received: Tensor) -> None:
    """Merge the sketches of all processes, which lie one process behind the other."""
    if not sketches:
        return
    shapes = [t.shape for sketch in sketches.values() for t in sketch.partial()]
    shares = received.split(received.numel() // world_size())
    partials = [unpack(share, shapes) for share in shares]
    at = 0
    for name, sketch in sketches.items():
        count = len(sketch.partial())
        with _naming(name):
            sketch.merge([parts[at : at + count] for parts in partials])
        at += count
