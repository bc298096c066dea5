import itertools

import pytest
import torch

from app.initialization.factors import SVD
from app.initialization.gradient_estimators import ExactGradient, rank_error
from app.initialization.gradient_sketch import RandomColumns, SharedInput, SketchedGradient
from tests.support.gradient_streams import (
    CPU,
    RANK,
    best,
    decaying,
    gradient,
    product,
    relative,
    sketched,
    stream,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_is_the_sum_over_tokens(dtype):
    """In float32, of streams in low precision as well."""
    tokens = stream(40, 30, decaying(30), batches=40, tokens=3)
    pairs = [(x.to(dtype), delta.to(dtype)) for x, delta in tokens]
    exact = ExactGradient(40, 30, CPU)
    for x, delta in pairs:
        exact.update(x, delta)
    G = gradient(pairs)
    assert exact.total.dtype == torch.float32
    assert relative(exact.total.double(), G) < 1e-6
    estimate = exact.estimate(RANK, 0.5)
    assert relative(product(estimate.svd), 0.5 * best(G, RANK)) < 1e-5
    assert estimate.norm == pytest.approx(0.5 * float(G.norm()), rel=1e-5)
    kept = float((best(G, RANK).norm() / G.norm()) ** 2)
    assert estimate.captured_energy == pytest.approx(kept, rel=1e-5)
    assert estimate.rank_error < 1e-6


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "sparse"), [(1, False), (1, True), (5, False), (50, True)])
def test_a_sketch_as_wide_as_the_rank_is_exact(tokens, sparse, passes):
    pairs = stream(60, 90, decaying(6), batches=12, tokens=tokens, sparse=sparse)
    estimate = sketched(pairs, width=6, passes=passes).estimate(RANK, 1.0)
    G = gradient(pairs)
    assert relative(product(estimate.svd), G) < 2e-5
    assert relative(product(estimate.svd, RANK), best(G, RANK)) < 2e-5
    assert estimate.rank_error < 1e-4
    assert estimate.norm == pytest.approx(float(G.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("base", "tokens", "limits"),
    [
        (0.6, 20, (2e-4, 1e-4, 1e-5, 1e-5)),
        (0.8, 20, (0.02, 0.012, 1e-3, 1e-4)),
        (0.8, 1, (0.02, 0.012, 1e-3, 1e-4)),
    ],
)
def test_sketch_against_the_float64_svd_of_the_exact_gradient(base, tokens, limits):
    """Each further pass is at least as good on average, and better at the end."""
    errors = torch.zeros(4, 4)
    for seed in range(4):
        pairs = stream(80, 120, decaying(80, base), batches=160 // tokens, tokens=tokens, seed=seed)
        wanted = best(gradient(pairs), RANK)
        for passes in range(1, 5):
            estimate = sketched(pairs, width=12, passes=passes, seed=seed).estimate(RANK, 1.0)
            errors[passes - 1, seed] = relative(product(estimate.svd, RANK), wanted)
    mean = errors.mean(dim=1)
    assert all(float(error) < limit for error, limit in zip(mean, limits, strict=True))
    for before, after in itertools.pairwise(mean):
        assert float(after) <= 1.02 * float(before) + 1e-5


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_error_estimates_are_within_a_factor_of_two(passes):
    """`rank_error` in the mean over layers and for nine in ten of them, the others for each."""
    ratios, estimated, true = [], 0.0, 0.0
    for seed in range(20):
        pairs = stream(80, 120, decaying(80, 0.85), batches=10, tokens=20, seed=seed)
        estimate = sketched(pairs, width=RANK + 8, passes=passes, seed=seed).estimate(RANK, 0.1)
        G = 0.1 * gradient(pairs)
        error = relative(product(estimate.svd, RANK), best(G, RANK))
        ratios.append(estimate.rank_error / error)
        estimated, true = estimated + estimate.rank_error, true + error
        cut = relative(product(estimate.svd, RANK), G)
        assert 0.5 < (1 - estimate.captured_energy) ** 0.5 / cut < 2
        assert estimate.norm == pytest.approx(float(G.norm()), rel=0.05)
    assert 0.5 < estimated / true < 2
    assert sum(0.5 < ratio < 2 for ratio in ratios) >= 18


def test_inputs_that_touch_one_feature_at_a_time_are_not_missed():
    """The columns that earlier micro-batches left empty must not be coordinate axes."""
    pairs = [(torch.eye(90)[80 + b : 81 + b], torch.randn(1, 60)) for b in range(6)]
    for passes in (1, 2):
        estimate = sketched(pairs, width=6, passes=passes).estimate(6, 1.0)
        assert relative(product(estimate.svd), gradient(pairs)) < 1e-4


@pytest.mark.parametrize("passes", [1, 2])
def test_a_first_micro_batch_of_zeros_is_harmless(passes):
    pairs = stream(40, 50, decaying(6), batches=6, tokens=9, sparse=True)
    pairs.insert(0, (pairs[0][0], torch.zeros_like(pairs[0][1])))
    estimate = sketched(pairs, width=8, passes=passes).estimate(RANK, 1.0)
    assert relative(product(estimate.svd, RANK), best(gradient(pairs), RANK)) < 1e-4


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_zero_gradient_is_exactly_zero(passes):
    pairs = [(x, torch.zeros_like(delta)) for x, delta in stream(12, 20, decaying(9), 3, 5)]
    for estimate in (
        sketched(pairs, width=10, passes=passes).estimate(RANK, 1.0),
        sketched([], width=10, m=12, n=20).estimate(RANK, 1.0),
    ):
        assert float(estimate.svd.S.abs().max()) == 0
        assert (estimate.norm, estimate.captured_energy, estimate.rank_error) == (0, 0, 0)


def test_width_beyond_the_smaller_side_is_cut_and_exact():
    pairs = stream(6, 50, decaying(6), batches=3, tokens=8)
    accumulator = sketched(pairs, width=16)
    assert accumulator.right.shape == (50, 6)
    assert relative(product(accumulator.estimate(6, 1.0).svd), gradient(pairs)) < 1e-5


@pytest.mark.parametrize("exponent", [-20, 20])
def test_very_small_and_large_gradients(exponent):
    pairs = stream(30, 40, decaying(5), batches=4, tokens=6)
    scaled = [(x, delta * 2.0**exponent) for x, delta in pairs]
    estimate = sketched(scaled, width=6).estimate(RANK, 2.0**-exponent)
    assert relative(product(estimate.svd), gradient(pairs)) < 2e-5


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_layers_that_read_one_input_are_sketched_as_if_alone(passes):
    """Of several widths and numbers of rows, in any order; one is not reached at times."""
    shapes = {"q": (50, 12), "k": (20, 9), "v": (20, 9)}
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(15, 40, generator=g) for _ in range(4)]
    deltas = [
        {name: torch.randn(15, m, generator=g) for name, (m, _) in shapes.items()} for _ in inputs
    ]
    columns = RandomColumns(CPU, 0)
    shared, alone = (
        {name: SketchedGradient(m, 40, width, columns) for name, (m, width) in shapes.items()}
        for _ in range(2)
    )
    for number in range(passes):
        if number:
            for sketch in (*shared.values(), *alone.values()):
                sketch.next_pass()
        for i, (x, delta) in enumerate(zip(inputs, deltas, strict=True)):
            heard = ["v", "k", "q"] if i != 2 else ["k", "v"]
            together = SharedInput(x, list(shared.values()))
            for name in heard:
                together.update(shared[name], delta[name])
                alone[name].update(x, delta[name])
            together.finish()
    for name in shapes:
        one, other = shared[name].estimate(RANK, 1.0), alone[name].estimate(RANK, 1.0)
        assert relative(product(one.svd, RANK), product(other.svd, RANK)) < 1e-4
        assert shared[name].awaited is None


def test_an_input_that_is_read_again_before_its_first_step_has_ended():
    """A layer that two inputs wait for: the step under way ends before the sketch is read."""
    pairs = stream(30, 40, decaying(6), batches=2, tokens=30)
    (x, delta), (other_x, other_delta) = pairs
    columns = RandomColumns(CPU, 0)
    sketch, unheard = (SketchedGradient(30, 40, 8, columns) for _ in range(2))
    first = SharedInput(x, [sketch, unheard])
    first.update(sketch, delta)
    SharedInput(other_x, [sketch]).update(sketch, other_delta)
    assert first.missing == 1
    first.finish()
    assert relative(product(sketch.estimate(RANK, 1.0).svd), gradient(pairs)) < 2e-5


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_layer_that_reads_one_input_twice(passes):
    pairs = stream(30, 40, decaying(6), batches=4, tokens=30)
    sketch = SketchedGradient(30, 40, 8, RandomColumns(CPU, 0))
    for number in range(passes):
        if number:
            sketch.next_pass()
        for x, delta in pairs:
            shared = SharedInput(x, [sketch, sketch])
            shared.update(sketch, delta)
            shared.update(sketch, delta)
    assert relative(product(sketch.estimate(RANK, 1.0).svd), 2 * gradient(pairs)) < 2e-5


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_sketch_holds_two_thin_matrices_and_its_probes(passes):
    m, n, width = 70, 110, 12
    pairs = stream(m, n, decaying(20), batches=3, tokens=9)
    accumulator = sketched(pairs, width, passes)
    held = sum(v.numel() for v in vars(accumulator).values() if isinstance(v, torch.Tensor))
    assert held == (m + n) * (width + 2 * SketchedGradient.PROBES) + n * width
    bases = {v.untyped_storage().nbytes() for v in vars(accumulator).values() if torch.is_tensor(v)}
    assert max(bases) <= 4 * max(m, n) * (width + SketchedGradient.PROBES)


@pytest.mark.parametrize("where", ["x", "delta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_update_tells_when_something_is_not_finite(kind, value, where):
    pairs = stream(12, 20, decaying(9), batches=4, tokens=5)
    if kind == "exact":
        accumulators = [ExactGradient(12, 20, CPU)]
    else:
        accumulators = [sketched(pairs, 6, passes) for passes in (1, 2, 3)]
    for accumulator in accumulators:
        x, delta = (t.clone() for t in pairs[0])
        assert accumulator.update(x, delta).isfinite().all()
        (x if where == "x" else delta)[2, 3] = value
        assert not accumulator.update(x, delta).isfinite().all()


def hadamard(n):
    """Return n probes of entries +1 and -1 that make every estimate exact: Phi Phi^T = n I."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize("inside", [0.0, 1.0, -1.0, 3.0])
@pytest.mark.parametrize("gap", [0.3, 0.004])
def test_rank_error_is_that_of_the_perturbed_matrix(gap, inside):
    """With exact probes: against the float64 SVD of H + E, also where E decides what the start holds."""
    m = n = 64
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 8, generator=g).double())[0] for _ in range(2))
    S = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.5 - gap, 0.1, 0.05, 0.02]).double()
    E = 1e-4 * torch.randn(m, n, generator=g).double()
    # Moves the fourth direction against the fifth: small beside a wide gap, decisive in a narrow one.
    E = E + inside * 1e-3 * (torch.outer(U[:, 4], V[:, 4]) + torch.outer(U[:, 3], V[:, 4]))
    H, G = U * S @ V.T, U * S @ V.T + E
    wanted = relative(best(H, RANK), best(G, RANK))
    probes = hadamard(64)
    svd = SVD(U.float(), S.float(), V.float())
    error = rank_error(svd, RANK, E.float() @ probes, E.float().T @ probes, probes, probes)
    assert error == pytest.approx(wanted, rel=0.1)


def test_norm_and_energy_where_most_is_missed():
    """A flat spectrum, of which the sketch holds a small part: probes have to tell the rest."""
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(200, 120, generator=g), torch.randn(200, 80, generator=g))]
    G = gradient(pairs)
    energies, norms = [], []
    for seed in range(10):
        estimate = sketched(pairs, width=RANK + 2, seed=seed).estimate(RANK, 1.0)
        norms.append(estimate.norm / float(G.norm()))
        left = relative(product(estimate.svd, RANK), G) ** 2
        energies.append((1 - estimate.captured_energy) / left)
    assert sum(norms) / 10 == pytest.approx(1, rel=0.03)
    assert sum(energies) / 10 == pytest.approx(1, rel=0.05)


def test_signs_are_decomposed_in_the_place_of_the_sum():
    """Whatever the scale; an entry that is 0 has none."""
    tokens = stream(40, 30, decaying(30), batches=10, tokens=3)
    for x, _ in tokens:
        x[:, 7] = 0
    exact = ExactGradient(40, 30, CPU, signs=True)
    for x, delta in tokens:
        exact.update(x, delta)
    signs = gradient(tokens).sign()
    estimate = exact.estimate(RANK, 0.5)
    assert relative(product(estimate.svd), best(signs, RANK)) < 1e-4
    assert estimate.norm == pytest.approx((40 * 29) ** 0.5)
    exact.total[0, 0] = float("inf")
    with pytest.raises(ValueError, match="its sum is not finite"):
        exact.estimate(RANK, 0.5)
