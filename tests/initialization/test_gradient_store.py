"""Sketches of several processes become one, and layers are spread over processes."""

import pytest
import torch

from app.initialization.gradient_exchange import (
    BUCKET_NUMBERS,
    Layer,
    assign_buckets,
    assign_owners,
)
from app.initialization.gradient_sketch import RandomColumns, SketchedGradient
from app.initialization.gradient_store import ExactStore, SketchStore
from app.utils.errors import InputError
from tests.support.gradient_streams import (
    CPU,
    RANK,
    best,
    decaying,
    gradient,
    product,
    relative,
    stream,
)

WIDTH = RANK + 8


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_merged_sketches_are_as_near_as_one(processes, passes):
    """Each process sees its share of the micro-batches; all draw the same probes."""
    pairs = stream(80, 120, decaying(80, 0.75), batches=10, tokens=20)
    kept = [SketchedGradient(80, 120, WIDTH, RandomColumns(CPU, 1)) for _ in range(processes)]
    for number in range(passes):
        if number:
            for sketch in kept:
                sketch.left, sketch.right = kept[0].left, kept[0].right
                sketch.next_pass()
        for i, (x, delta) in enumerate(pairs):
            kept[i % processes].update(x, delta)
        # The first process owns the layer.
        kept[0].merge([sketch.partial() for sketch in kept])
    estimate, wanted = kept[0].estimate(RANK, 1.0), best(gradient(pairs), RANK)
    error = relative(product(estimate.svd, RANK), wanted)
    assert error < (0.02, 0.01, 1e-3, 1e-4)[passes - 1]
    assert 0.4 < estimate.rank_error / error < 3
    assert estimate.norm == pytest.approx(float(gradient(pairs).norm()), rel=0.02)


def test_a_process_without_rows_changes_nothing():
    pairs = stream(30, 40, decaying(6), batches=3, tokens=9)
    busy, idle = (SketchedGradient(30, 40, WIDTH, RandomColumns(CPU, 1)) for _ in range(2))
    for x, delta in pairs:
        busy.update(x, delta)
        idle.update(x, torch.zeros_like(delta))
    idle.merge([idle.partial(), busy.partial()])
    assert relative(product(idle.estimate(6, 1.0).svd), gradient(pairs)) < 1e-4


@pytest.mark.parametrize("processes", [1, 2, 7, 300])
def test_every_layer_has_one_owner_and_loads_are_even(processes):
    shapes = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 8
    layers = [Layer(str(i), m, n) for i, (m, n) in enumerate(shapes)]
    buckets = assign_buckets(layers, processes)
    order = [layer for _, group in buckets for layer in group]
    assert order == layers[::-1]
    largest = max(m * n for _, m, n in layers)
    for owner, group in buckets:
        assert 0 <= owner < processes
        assert len(group) == 1 or sum(m * n for _, m, n in group) <= BUCKET_NUMBERS
    loads = [0] * processes
    for owner, group in buckets:
        loads[owner] += sum(m * n for _, m, n in group)
    assert max(loads) <= sum(loads) / processes + largest
    owners = assign_owners(layers, processes)
    assert owners.keys() == {layer.name for layer in layers}
    assert set(owners.values()) == set(range(min(processes, len(layers))))


def test_small_models_give_every_process_something():
    layers = [Layer(str(i), 16, 16) for i in range(14)]
    assert {owner for owner, _ in assign_buckets(layers, 2)} == {0, 1}


def stores():
    layers = [Layer("small", 8, 9), Layer("other", 8, 9)]
    sketch = SketchStore(layers, {"small": 4, "other": 4}, CPU, RandomColumns(CPU, 1))
    return ExactStore(layers, CPU), sketch


def test_neither_no_tokens_nor_many_large_numbers_are_reported_as_not_finite():
    for store in stores():
        none = torch.ones(0, 9), torch.ones(0, 8)
        large = torch.full((30, 9), 3e37), torch.zeros(30, 8)
        assert bool(store.update("small", *none, ["small"]).isfinite().all())
        assert bool(store.update("small", *large, ["small"]).isfinite().all())


def test_a_batch_ends_without_the_readers_that_its_loss_does_not_depend_on():
    """`other` reads the same input and hears nothing, also in the last batch."""
    pairs = stream(8, 9, decaying(2), batches=2, tokens=5)
    _, sketch = stores()
    for x, delta in pairs:
        sketch.update("small", x, delta, ["small", "other"])
        sketch.end_batch()
    sketch.end_pass()
    found = sketch.estimates({"small": 2, "other": 2}, 1.0)
    assert relative(product(found["small"].svd), gradient(pairs)) < 1e-5
    assert found["other"].norm == 0


def test_a_sum_that_overflows_names_its_layer():
    exact, sketch = stores()
    huge = torch.full((3, 9), 1e20), torch.full((3, 8), 1e20)
    assert bool(exact.update("small", *huge, ["small"]).isfinite().all())
    assert not sketch.update("small", *huge, ["small"]).isfinite().all()
    exact.update("other", torch.ones(3, 9), torch.ones(3, 8), ["other"])
    exact.end_pass()
    with pytest.raises(InputError, match="the gradient at small cannot be decomposed"):
        exact.estimates({"small": 2, "other": 2}, 1.0)
