"""Keep all layers' gradients while they are observed, on one process or spread over many.

Several processes each see their share of the samples. A layer has one owner, the process that in the
end holds its sum over all processes and decomposes it; then all get every layer's estimate.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from app.distributed.collectives import (
    largest_over_processes,
    raise_on_all_ranks,
    sum_over_processes,
)
from app.distributed.processes import global_rank, world_size
from app.initialization.factors import full_float32
from app.initialization.gradient_estimators import ExactGradient, GradientEstimate, largest
from app.initialization.gradient_exchange import (
    Layer,
    assign_buckets,
    assign_owners,
    broadcast_from_owners,
    share_estimates,
    unpack,
)
from app.initialization.gradient_hooks import Listener
from app.initialization.gradient_sketch import RandomColumns, SharedInput, SketchedGradient
from app.utils.errors import InputError


class GradientStore(ABC):
    """Keep all layers' gradients from their stream of (x, delta), over one or more passes.

    Args:
        layers: The layers in module order, the same on every process.
        owners: The process that owns a layer.
        widths: Triplets of each layer's estimate where they are not the rank asked for; cut to min(m, n).
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        device: torch.device,
        owners: Mapping[str, int],
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.device = device
        self.owners = owners
        self.widths = widths
        self.sent_bytes = 0  # by this process to others
        self._reached: set[str] = set()
        self._largest: dict[str, Tensor] = {}  # finite only if all x and delta are
        self._own: Mapping[str, ExactGradient | SketchedGradient] = {}

    def listener(self, name: str) -> Listener:
        """Return the listener of a layer: `update`, which also records whether all was finite."""

        def listen(x: Tensor, delta: Tensor, readers: Sequence[str]) -> None:
            self._reached.add(name)
            with full_float32():
                found = self.update(name, x, delta, readers)
            self._largest[name] = torch.maximum(found, self._largest.get(name, found))

        return listen

    @abstractmethod
    def update(self, name: str, x: Tensor, delta: Tensor, readers: Sequence[str]) -> Tensor:
        """Add delta^T x to a layer; the number that is returned is finite only if x and delta are."""

    @abstractmethod
    def end_batch(self) -> None:
        """Finish a micro-batch; every process does so equally often."""

    def next_pass(self) -> None:
        """Prepare for one more pass over the same samples."""
        raise NotImplementedError(f"one pass is enough for {type(self).__name__}")

    @abstractmethod
    def merge(self) -> Mapping[str, ExactGradient | SketchedGradient]:
        """Sum what is left over processes; return the gradients of the layers that this process owns."""

    def end_pass(self) -> None:
        """Finish a pass over the samples, on every process."""
        self._own = self.merge()

    def estimates(self, ranks: Mapping[str, int], scale: float) -> dict[str, GradientEstimate]:
        """Decompose the own layers after a pass, scaled, and share the results: the same on every process.

        Raises:
            InputError: On every process, if a layer's gradient cannot be decomposed.
        """

        @full_float32()
        def decompose() -> dict[str, GradientEstimate]:
            estimates = {}
            for name, gradient in self._own.items():
                with _naming(name):
                    estimates[name] = gradient.estimate(ranks[name], scale)
            return estimates

        widths = self.widths or ranks
        shapes = {name: (m, n, min(widths[name], m, n)) for name, m, n in self.layers}
        decomposed = raise_on_all_ranks(decompose)
        estimates, sent_bytes = share_estimates(decomposed, shapes, self.owners, self.device)
        self.sent_bytes += sent_bytes
        return estimates

    def pop_non_finite(self) -> str | None:
        """Name the layer, on any process, where the last backward pass first met what is not finite."""
        none = torch.zeros((), device=self.device)
        sizes = torch.stack([self._largest.get(layer.name, none) for layer in self.layers])
        self._largest = {}
        # The host waits for the device here, once a micro-batch.
        counts = sum_over_processes((~sizes.isfinite()).float()).tolist()
        # Backwards: the layers below inherit it.
        backward = zip(reversed(self.layers), reversed(counts), strict=True)
        return next((layer.name for layer, count in backward if count), None)

    def unreached(self) -> list[str]:
        """Name the layers that the backward passes have reached on no process."""
        reached = [float(layer.name in self._reached) for layer in self.layers]
        counts = sum_over_processes(torch.tensor(reached, device=self.device)).tolist()
        return [layer.name for layer, count in zip(self.layers, counts, strict=True) if not count]


class ExactStore(GradientStore):
    """Keep the whole gradient of each layer, float32, on one process only: its owner.

    Neighbouring layers form buckets. A bucket of products delta^T x is summed to its owner as soon as
    the backward pass has been through its layers, so that a process holds its own sums and the buckets
    under way, and never all gradients.

    Processes may reach different layers (a mixture of experts), in another order, or more than once. So in
    every micro-batch each process sends every bucket once, in the order of the buckets, empty ones too;
    what enters a bucket afterwards waits for the next micro-batch.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device, signs: bool = False) -> None:
        self.buckets = assign_buckets(layers, world_size())
        owners = {layer.name: owner for owner, members in self.buckets for layer in members}
        super().__init__(layers, device, owners)
        self.bucket_of = {
            layer.name: i for i, (_, members) in enumerate(self.buckets) for layer in members
        }
        self.sums = {
            layer.name: ExactGradient(layer.m, layer.n, device, signs)
            for layer in layers
            if owners[layer.name] == global_rank()
        }
        # The buckets under way: a flat buffer, and the part of it that is each layer's.
        self._staged: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        self._start_batch()

    def _start_batch(self) -> None:
        self._next = 0  # the bucket that is sent next
        self._waiting = [{layer.name for layer in members} for _, members in self.buckets]

    def update(self, name: str, x: Tensor, delta: Tensor, readers: Sequence[str]) -> Tensor:
        """Add delta^T x, here or, with several processes, to the bucket under way."""
        if world_size() == 1:
            return self.sums[name].update(x, delta)
        bucket = self.bucket_of[name]
        x, delta = x.float(), delta.float()
        self._stage(bucket)[1][name].addmm_(delta.T, x)
        self._waiting[bucket].discard(name)
        while self._next < len(self.buckets) and not self._waiting[self._next]:
            self._send(self._next)
            self._next += 1
        return largest(x, delta)

    def _stage(self, bucket: int) -> tuple[Tensor, dict[str, Tensor]]:
        if bucket not in self._staged:
            shapes = {layer.name: torch.Size(layer[1:]) for layer in self.buckets[bucket][1]}
            flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=self.device)
            parts = unpack(flat, list(shapes.values()))
            self._staged[bucket] = flat, dict(zip(shapes, parts, strict=True))
        return self._staged[bucket]

    def _send(self, bucket: int) -> None:
        flat, parts = self._stage(bucket)
        del self._staged[bucket]
        owner = self.buckets[bucket][0]
        dist.reduce(flat, dst=owner)
        if owner == global_rank():
            for name, part in parts.items():
                self.sums[name].total += part
        else:
            self.sent_bytes += flat.nbytes

    def end_batch(self) -> None:
        """Send the buckets that the backward pass left incomplete."""
        if world_size() > 1:
            for bucket in range(self._next, len(self.buckets)):
                self._send(bucket)
            self._start_batch()

    def merge(self) -> dict[str, ExactGradient]:
        """Send what entered a bucket late in the last micro-batch."""
        if largest_over_processes(len(self._staged), self.device):
            self.end_batch()
        return self.sums


class SketchStore(GradientStore):
    """Keep a sketch of each layer on every process, of its own samples; the layer's owner merges them.

    Args:
        widths: Columns of each layer's sketch.
        columns: Makes the random matrices, the same on every process: the probes have to be equal.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        widths: Mapping[str, int],
        device: torch.device,
        columns: RandomColumns,
    ) -> None:
        super().__init__(layers, device, assign_owners(layers, world_size()), widths)
        self.sketches = {
            name: SketchedGradient(m, n, widths[name], columns) for name, m, n in layers
        }
        # Inputs that wait for readers, by the identity of the sequence of readers, which is kept with them.
        self._inputs: dict[int, tuple[SharedInput, Sequence[str]]] = {}

    def update(self, name: str, x: Tensor, delta: Tensor, readers: Sequence[str]) -> Tensor:
        """Add one micro-batch of (x, delta) to the layer's sketch, when all readers of x have had theirs."""
        if id(readers) not in self._inputs:
            shared = SharedInput(x, [self.sketches[reader] for reader in readers])
            self._inputs[id(readers)] = shared, readers
        shared, _ = self._inputs[id(readers)]
        found = shared.update(self.sketches[name], delta)
        if shared.missing == 0:
            del self._inputs[id(readers)]
        return found

    def end_batch(self) -> None:
        """Finish the inputs with readers that the loss does not depend on."""
        for shared, _ in self._inputs.values():
            shared.finish()
        self._inputs = {}

    def next_pass(self) -> None:
        """Send every process the merged sketches, and take the next half step from them."""
        if world_size() > 1:
            sides = {name: kept.sides() for name, kept in self.sketches.items()}
            self.sent_bytes += broadcast_from_owners(sides, self.owners)
        for sketch in self.sketches.values():
            sketch.next_pass()

    def merge(self) -> dict[str, SketchedGradient]:
        """Send each layer's sketches to its owner, who merges them."""
        owned: list[dict[str, SketchedGradient]] = [{} for _ in range(world_size())]
        for name, sketch in self.sketches.items():
            owned[self.owners[name]][name] = sketch
        own = owned[global_rank()]
        if world_size() > 1:
            packed = [
                [t.reshape(-1) for sketch in group.values() for t in sketch.partial()]
                for group in owned
            ]
            sizes = [sum(part.numel() for part in parts) for parts in packed]
            size = sizes[global_rank()]
            received = torch.empty(size * world_size(), device=self.device)
            flat = torch.cat([part for parts in packed for part in parts])
            dist.all_to_all_single(received, flat, [size] * world_size(), sizes)
            self.sent_bytes += flat.element_size() * (sum(sizes) - size)
            raise_on_all_ranks(lambda: _merge(own, received))
        return own


def _merge(sketches: Mapping[str, SketchedGradient], received: Tensor) -> None:
    """Merge the sketches of all processes, which lie one process behind the other."""
    if not sketches:
        return
    shapes = [t.shape for sketch in sketches.values() for t in sketch.partial()]
    shares = received.split(received.numel() // world_size())
    partials = [iter(unpack(share, shapes)) for share in shares]
    for name, sketch in sketches.items():
        count = len(sketch.partial())
        with _naming(name):
            sketch.merge([[next(parts) for _ in range(count)] for parts in partials])


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise InputError(
            f"the gradient at {layer} cannot be decomposed ({str(error).splitlines()[0]}), though all inputs "
            "and output gradients were finite: their products overflow. Look at the initialization rows "
            "and at the model's weights"
        ) from error
