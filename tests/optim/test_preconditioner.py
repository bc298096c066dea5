"""The preconditioner against explicit inverses in float64."""

import pytest
import torch

from app.optim.preconditioner import damped_inverse, gram_matrices, precondition_pairs
from tests.support.lora_pairs import SHAPES, make_pairs, textbook

LARGE = [(4, 33000, 2)] * 5  # more than one stack: the size limit is 2**17 elements on CPU


def precondition(params, damping, relative=0.0):
    """Return P_A and P_B of each pair, in the order of the parameters."""
    a, b = params[::2], params[1::2]
    grads = [p.grad for p in a], [p.grad for p in b]
    p_a, p_b = precondition_pairs(a, b, *grads, damping, relative_damping=relative)
    return [direction for pair in zip(p_a, p_b, strict=True) for direction in pair]


def wanted(params, damping, relative=0.0):
    pairs = zip(params[::2], params[1::2], strict=True)
    return [p for a, b in pairs for p in textbook(a, b, a.grad, b.grad, damping, relative)]


@pytest.mark.parametrize(
    ("shapes", "dtype", "damping", "relative", "tolerance"),
    [
        # In float32 the damping of a Gram entry of 20 is at least its rounding, 1e-6 of it.
        *((SHAPES, torch.float32, damping, 0.0, 2e-4) for damping in (0.0, 1e-6, 0.3)),
        *((SHAPES, torch.float64, damping, 0.0, 1e-10) for damping in (0.0, 1e-6, 0.3)),
        *((SHAPES, torch.float64, damping, 0.1, 1e-10) for damping in (1e-30, 0.3)),
        # Only the result is rounded to 16 bits.
        *(
            (SHAPES, dtype, 1e-2, 0.1, torch.finfo(dtype).eps)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        (LARGE, torch.float32, 0.1, 0.1, 1e-4),
    ],
)
def test_the_textbook_formula(shapes, dtype, damping, relative, tolerance):
    params = make_pairs(shapes, dtype)
    both = precondition(params, damping, relative), wanted(params, damping, relative)
    for got, want in zip(*both, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_relative_damping_does_not_depend_on_the_size_of_the_factors(size):
    """The direction is that of factors of size 1: the Gram matrix is divided out with its damping."""
    params = make_pairs(SHAPES, torch.float64)
    before = precondition(params, 1e-60, 0.1)
    with torch.no_grad():
        for p in params:
            p.mul_(size)
    for got, want in zip(precondition(params, 1e-60, 0.1), before, strict=True):
        torch.testing.assert_close(size**2 * got, want, rtol=1e-9, atol=0.0)


def test_the_step_of_the_product_does_not_depend_on_the_parametrisation():
    m, n, r = 12, 20, 4
    weight_grad = torch.randn(m, n, dtype=torch.float64)
    a, b = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    mix = torch.randn(r, r, dtype=torch.float64) + 2 * torch.eye(r, dtype=torch.float64)

    def product_steps(a, b):
        g_a, g_b = b.T @ weight_grad, weight_grad @ a.T
        (p_a,), (p_b,) = precondition_pairs([a], [b], [g_a], [g_b], 0.0)
        return b @ p_a + p_b @ a, b @ g_a + g_b @ a

    ours, plain = product_steps(a, b)
    ours_mixed, plain_mixed = product_steps(torch.linalg.inv(mix) @ a, b @ mix)
    torch.testing.assert_close(ours_mixed, ours, rtol=1e-9, atol=1e-9)
    assert (plain_mixed - plain).norm() > 0.1 * plain.norm()


def test_damping_acts_where_it_is_above_the_rounding_of_the_gram_matrix():
    # One direction of size 0.6 in the Gram matrix, damping 1e-6: 1e-7 of rounding is below it.
    b = 0.05 * torch.randn(64, 1) @ torch.ones(1, 4)
    inverse, _ = damped_inverse(gram_matrices([b], "lora_B", {}), 1e-6)
    values = torch.linalg.eigvalsh(inverse[0])
    torch.testing.assert_close(values[1:], torch.full((3,), 1e6).double(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("rank", [8, 64, 200])
@pytest.mark.parametrize("damping", [(1e-6,), (1e-30,), (1e-30, 1e-12), (1e-30, 0.1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_damping_above_zero_succeeds_on_rank_deficient_factors(rank, damping, size, dtype):
    factor = (size * torch.randn(300, 2).double() @ torch.randn(2, rank).double()).to(dtype)
    gram = torch.cat([gram_matrices([factor], "lora_B", {}), torch.zeros(1, rank, rank).to(dtype)])
    inverse, singular = damped_inverse(gram, *damping)
    assert singular is None
    assert inverse.isfinite().all()
    values = torch.linalg.eigvalsh(inverse)
    assert (values[:, 0] >= -1e-12 * values[:, -1]).all()


@pytest.mark.parametrize("relative", [0.0, 0.1])
def test_zero_lora_b_divides_by_damping(relative):
    params = make_pairs(SHAPES[:1])
    params[1].data.zero_()
    p_a, p_b = precondition(params, 1e-6, relative)
    torch.testing.assert_close(p_a, params[0].grad / 1e-6)
    torch.testing.assert_close(
        p_b.double(), wanted(params, 1e-6, relative)[1], rtol=1e-4, atol=1e-6
    )


def test_small_but_regular_columns_are_not_called_singular():
    b = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-7, 1e-9, 1e3]).double()
    _, singular = damped_inverse(gram_matrices([b], "lora_B", {}), 0.0)
    assert not singular.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("where", ["factor", "gradient"])
def test_values_that_are_not_finite_pass_through(bad, damping, where):
    params = make_pairs(SHAPES[:2])
    with torch.no_grad():
        (params[1] if where == "factor" else params[0].grad)[0, 0] = bad
    first, *others = precondition(params, damping)
    assert not first.isfinite().all()
    assert all(t.isfinite().all() for t in others)
