"""The SVD and the factors against the paper's formulas in float64."""

import pytest
import torch

from app.initialization.factors import (
    SVD,
    common_unit,
    fix_signs,
    lora_ga_factors,
    low_rank_svd,
    spectral_factors,
    truncated_svd,
)
from app.initialization.gradient_estimators import ExactGradient
from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora, install, lora_pairs

GAMMA = 128.0


def random_gradient(kind, m=40, n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=g, dtype=torch.float64)
    if kind == "rank-deficient":
        matrix = matrix[:, :3] @ torch.randn(3, n, generator=g, dtype=torch.float64)
    elif kind == "ill-conditioned":
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = U * torch.logspace(4, -8, min(m, n), dtype=torch.float64) @ Vh
    elif kind in ("tiny", "huge"):
        matrix = matrix * {"tiny": 1e-12, "huge": 1e10}[kind]
    return matrix.bfloat16() if kind == "bfloat16" else matrix.float()


def formula(G, rank, gamma):
    """Algorithm 1 in float64, written from the paper: SVD of -G, S / S[0], square roots in both."""
    U, S, Vh = torch.linalg.svd(-G.double(), full_matrices=False)
    root = torch.diag((S[:rank] / S[0]).sqrt())
    lora_B = gamma**-0.5 * U[:, :rank] @ root
    lora_A = gamma**-0.5 * root @ Vh[:rank]
    return lora_A, lora_B, S


KINDS = ["random", "rank-deficient", "ill-conditioned", "bfloat16", "tiny", "huge"]


@pytest.mark.parametrize("rank", [1, 4, 24])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_equal_the_float64_formula(kind, shape, rank):
    G = random_gradient(kind, *shape)
    factors = spectral_factors(truncated_svd(G, rank), GAMMA)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert (factors.lora_A.shape, factors.lora_B.shape) == ((rank, shape[1]), (shape[0], rank))
    lora_A, lora_B, S = formula(G, rank, GAMMA)
    # A product is as accurate as float32 rounding of S_1, whatever the conditioning.
    wanted = lora_B @ lora_A
    error = (factors.lora_B.double() @ factors.lora_A.double() - wanted).norm()
    assert float(error) < 3e-7 / GAMMA
    # The best approximation leaves exactly the tail of the spectrum.
    step = GAMMA * S[0] * (factors.lora_B.double() @ factors.lora_A.double())
    left = (-G.double() - step).norm()
    assert float(left) == pytest.approx(float(S[rank:].norm()), abs=1e-6 * float(S[0]))
    # Pairs with a gap around them are unique up to a common sign.
    for i in range(rank):
        others = torch.cat([S[:i], S[i + 1 :]])
        if float((others - S[i]).abs().min()) < 1e-2 * float(S[i]) or float(S[i] / S[0]) < 1e-3:
            continue
        sign = torch.sign(factors.lora_A[i].double() @ lora_A[i])
        size = float(lora_A[i].norm())
        assert float((sign * factors.lora_A[i] - lora_A[i]).norm()) < 1e-4 * size
        assert float((sign * factors.lora_B[:, i] - lora_B[:, i]).norm()) < 1e-4 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.5, 16.0, 1024.0])
def test_factors_are_balanced(kind, gamma):
    rank = 6
    G = random_gradient(kind)
    S = torch.linalg.svdvals(G.double())[:rank]
    lora_A, lora_B = (f.double() for f in spectral_factors(truncated_svd(G, rank), gamma))
    wanted = torch.diag(S / S[0]) / gamma
    assert float((lora_B.T @ lora_B - wanted).abs().max()) < 1e-6 / gamma
    assert float((lora_A @ lora_A.T - wanted).abs().max()) < 1e-6 / gamma
    product = lora_B @ lora_A
    assert float(torch.linalg.svdvals(product)[0]) == pytest.approx(1 / gamma, rel=1e-6)
    # Descent: <G, lora_B lora_A> = -sum S_i^2 / S_1 / gamma.
    descent = float((G.double() * product).sum())
    assert descent == pytest.approx(-float(S.square().sum() / S[0]) / gamma, rel=1e-5)


def test_with_a_common_unit_all_layers_take_one_gradient_step():
    """Of one size for all layers, where Algorithm 1 gives each layer a step of the same spectral norm."""
    gradients = [size * random_gradient("random", seed=size) for size in (1, 7, 3)]
    svds = [truncated_svd(G, 5) for G in gradients]
    tops = [float(torch.linalg.svdvals(G.double())[0]) for G in gradients]
    unit = common_unit(svds)
    assert unit == pytest.approx(max(tops), rel=1e-6)
    for G, svd in zip(gradients, svds, strict=True):
        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        wanted = -(U[:, :5] * S[:5] @ Vh[:5]) / (GAMMA * max(tops))
        factors = spectral_factors(svd, GAMMA, unit)
        product = factors.lora_B.double() @ factors.lora_A.double()
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-6 / GAMMA)
    # The layer with the largest gradient takes the step that it takes alone.
    largest = svds[tops.index(max(tops))]
    for shared, alone in zip(
        spectral_factors(largest, GAMMA, unit), spectral_factors(largest, GAMMA), strict=True
    ):
        assert torch.equal(shared, alone)


def test_sign_convention_makes_equal_gradients_give_equal_factors():
    svd = truncated_svd(random_gradient("random"), 5)
    largest = svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    flips = torch.tensor([1.0, -1, 1, -1, -1])
    again = fix_signs(SVD(svd.U * flips, svd.S, svd.V * flips))
    assert torch.equal(again.U, svd.U)
    assert torch.equal(again.V, svd.V)
    # lora_B carries the minus of -G.
    assert bool(
        (spectral_factors(svd, 1.0).lora_B.gather(0, svd.U.abs().argmax(0)[None]) < 0).all()
    )


def test_wrong_arguments():
    svd = truncated_svd(random_gradient("random"), 3)
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be > 0"):
            spectral_factors(svd, gamma)
    with pytest.raises(ValueError, match="unit must be > 0"):
        spectral_factors(svd, GAMMA, unit=0.0)
    for top in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            spectral_factors(SVD(svd.U, torch.full((3,), top), svd.V), GAMMA)
    for rank in (0, 25):
        with pytest.raises(ValueError, match=r"rank must lie in 1\.\.24"):
            truncated_svd(random_gradient("random"), rank)


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_large_matrices_are_as_accurate_as_small_ones(decay):
    """Above 192 the path is subspace iteration."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(260, 220, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(220, 220, generator=g, dtype=torch.float64))[0]
    G = U * decay ** torch.arange(220, dtype=torch.float64) @ V.T
    for matrix, left, right in ((G, U, V), (G.T, V, U)):
        before = matrix.float()
        svd = truncated_svd(before, 8)
        assert torch.equal(before, matrix.float())
        S = decay ** torch.arange(8, dtype=torch.float64)
        assert torch.allclose(svd.S.double(), S, rtol=1e-5)
        wanted = left[:, :8] * S @ right[:, :8].T
        product = (svd.U * svd.S @ svd.V.T).double()
        gap = 1 - decay
        assert float((product - wanted).norm()) < 1e-5 + 1e-6 / gap
        assert float((svd.U.T @ svd.U - torch.eye(8)).abs().max()) < 1e-5


def large_gradient(kind, m=260, n=220):
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, n, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    S = {
        "orthogonal": torch.ones(n),
        "gap": torch.cat([torch.full((8,), 1.6), torch.ones(n - 8)]),
        "slow": 0.999 ** torch.arange(n),
        "clustered": torch.cat(
            [torch.ones(12) + 1e-5 * torch.arange(12), torch.full((n - 12,), 0.3)]
        ),
        "deficient": torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(n - 3)]),
        "zero": torch.zeros(n),
    }.get(kind)
    if kind == "identity":
        return torch.eye(m, n, dtype=torch.float64)
    if kind == "gaussian":
        return torch.randn(m, n, generator=g, dtype=torch.float64)
    return U * S.double() @ V.T


FLAT = ["orthogonal", "identity", "gap", "clustered", "deficient", "zero", "slow", "gaussian"]


@pytest.mark.parametrize("kind", FLAT)
def test_flat_spectra_are_left_with_the_residual_that_is_reported(kind, monkeypatch):
    """Against the float64 SVD, which is itself not called on anything large."""
    G = large_gradient(kind)
    truth = torch.linalg.svdvals(G)
    plain, rounds = torch.linalg.svd, []
    monkeypatch.setattr(
        torch.linalg, "svd", lambda M, **how: rounds.append(M.shape) or plain(M, **how)
    )
    gradient = ExactGradient(*G.shape, torch.device("cpu"))
    gradient.total.copy_(G)
    estimate = gradient.estimate(8, 1.0)
    assert set(rounds) == {(16, 16)}
    U, S, V = (part.double() for part in estimate.svd)
    if kind == "zero":
        assert (estimate.norm, estimate.captured_energy, estimate.rank_error) == (0, 0, 0)
        assert float(S.max()) == 0
        return
    scale = float(truth[0])
    assert float((G.T @ U - V * S).norm()) < 1e-5 * scale
    residual = float((G @ V - U * S).norm() / S.norm())
    assert estimate.rank_error == pytest.approx(residual, rel=0.02, abs=1e-6)
    best = float(truth[:8].square().sum() / truth.square().sum())
    if kind in ("slow", "gaussian"):
        assert 1e-4 < residual < 0.3
        assert 0.85 * best < estimate.captured_energy <= 1.001 * best
    else:
        assert residual < 1e-5
        assert torch.allclose(S, truth[:8], rtol=2e-5, atol=1e-5 * scale)
        assert estimate.captured_energy == pytest.approx(best, rel=1e-4)


def test_products_are_in_float32_whatever_the_run_allows(monkeypatch):
    """What the run has allowed is there again afterwards, also after an error."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, inside = torch.get_float32_matmul_precision(), []
    plain, G = torch.linalg.qr, large_gradient("gaussian").float()

    def qr(matrix):
        inside.append([backend.fp32_precision for backend in backends])
        if len(inside) == 2:
            raise RuntimeError("qr")
        return plain(matrix)

    torch.set_float32_matmul_precision("medium")
    try:
        allowed = [backend.fp32_precision for backend in backends]
        assert allowed == ["tf32", "bf16"]
        monkeypatch.setattr(torch.linalg, "qr", qr)
        with pytest.raises(RuntimeError, match="qr"):
            truncated_svd(G, 8)
        assert inside == [["ieee", "ieee"]] * 2
        assert [backend.fp32_precision for backend in backends] == allowed
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_truncated_svd_is_deterministic_and_leaves_random_state_alone():
    G = torch.randn(250, 200)
    state = torch.get_rng_state()
    one, other = truncated_svd(G, 8), truncated_svd(G, 8)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank", [1, 5, 9])
def test_low_rank_svd_equals_the_svd_of_the_product(rank):
    left, right = torch.randn(50, 9), torch.randn(31, 9)
    svd = low_rank_svd(left, right, rank)
    U, S, Vh = torch.linalg.svd(left.double() @ right.double().T, full_matrices=False)
    wanted = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert float((svd.U * svd.S @ svd.V.T - wanted).norm()) < 1e-5 * float(S[0])
    assert torch.allclose(svd.S.double(), S[:rank], rtol=1e-5)


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_the_first_step_has_spectral_norm_scaling_over_gamma(build, use_rslora, request):
    """Measured on PEFT's own weight update, in the layer's own layout."""
    settings = LoraSettings(r=4, lora_alpha=16, use_rslora=use_rslora)
    model = add_lora(request.getfixturevalue(build)(), settings)
    scaling = 16 / 2 if use_rslora else 16 / 4
    for pair in lora_pairs(model):
        assert pair.scaling == scaling
        m, n = pair.lora_B.shape[0], pair.lora_A.shape[1]
        G = torch.randn(m, n, dtype=torch.float64)
        factors = spectral_factors(truncated_svd(G, 4), GAMMA)
        held = (pair.lora_A.data_ptr(), pair.lora_B.data_ptr())
        install(pair, factors.lora_A, factors.lora_B)
        assert held == (pair.lora_A.data_ptr(), pair.lora_B.data_ptr())
        delta = pair.layer.get_delta_weight("default").detach().double()
        if pair.layer.fan_in_fan_out:
            delta = delta.T
        assert delta.shape == (m, n)
        assert float(torch.linalg.svdvals(delta)[0]) == pytest.approx(scaling / GAMMA, rel=1e-5)
        lora_A, lora_B, _ = formula(G, 4, GAMMA)
        assert torch.allclose(delta, scaling * lora_B @ lora_A, atol=1e-6 * scaling / GAMMA)


def test_lora_ga_takes_the_papers_vectors_and_scale():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(24, 17, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(gradient)
    A, B = lora_ga_factors(SVD(U[:, :8], S[:8], Vh[:8].T), 4, 64.0)
    scale = 24**0.25 / 8
    for i in range(4):
        assert torch.allclose(A[i], scale * Vh[i])
        assert torch.allclose(B[:, i], scale * U[:, 4 + i])
    # Its first step is the best one of rank 2r, up to a factor: s (dB A + B dA) with the raw gradients.
    step = gradient @ A.T @ A + B @ B.T @ gradient
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    assert torch.allclose(step / scale**2, best, atol=1e-10)
