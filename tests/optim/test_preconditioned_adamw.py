"""PreconditionedAdamW against a textbook loop, torch's AdamW and PEFT's Riemannian optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from app.optim.preconditioned_adamw import PreconditionedAdamW
from tests.support.lora_pairs import (
    SHAPES,
    TextbookAdamW,
    make_pairs,
    pair_group,
    set_grads,
)


def quadratic_loss(params, targets):
    """A loss whose gradient depends on both factors of each pair."""
    pairs = zip(params[::2], params[1::2], targets, strict=True)
    return sum(((b @ a - t) ** 2).mean() for a, b, t in pairs)


def make_problem(dtype=torch.float32):
    params = make_pairs(dtype=dtype, scale=0.3)
    targets = [torch.randn(m, n).to(dtype) for m, n, _ in SHAPES]
    return params, targets, make_closure(params, targets)


def make_closure(params, targets):
    def closure():
        for p in params:
            p.grad = None
        loss = quadratic_loss(params, targets)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("relative", [None, 0.2])
def test_ten_steps_equal_the_textbook(options, weight_decay, relative):
    """With a learning rate that a scheduler moves, and a damping of its own in each group."""
    params, _, closure = make_problem(torch.float64)
    damping = (0.7, 0.7, 1e-3, 1e-3)
    reference = TextbookAdamW(
        params, 0.0, *damping, relative=relative or 0.0, weight_decay=weight_decay
    )
    groups = [pair_group(params[:4], damping=0.7), pair_group(params[4:])]
    options = {**options, "damping": 1e-3, "relative_damping": relative}
    optimizer = PreconditionedAdamW(groups, lr=0.01, weight_decay=weight_decay, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    for step in range(10):
        closure()
        reference.lr = 0.01 * 0.8**step
        reference.step([p.grad for p in params])
        optimizer.step()
        scheduler.step()
        for got, want in zip(params, reference.p, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("singular", ["lora_A", "lora_B"])
def test_singular_gram_without_damping_names_the_pair(singular):
    params = make_pairs()
    index = 4 if singular == "lora_A" else 5  # pair 2
    with torch.no_grad():  # a repeated direction: rounding hides the zero pivot from Cholesky
        factor = params[index].mT if singular == "lora_B" else params[index]
        factor[3] = 0.3 * factor[0] + 0.7 * factor[1]
    optimizer = PreconditionedAdamW([pair_group(params, damping=0.0)])
    before, grads = copy.deepcopy(params), [p.grad for p in params]
    with pytest.raises(RuntimeError, match=f"pair 2: {singular}.* is singular"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))


def test_equals_peft_riemannian_adamw():
    peft = pytest.importorskip("peft")
    riemannian = pytest.importorskip("peft.optimizers.riemannian")
    base = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 14), nn.Linear(14, 6))
    config = peft.LoraConfig(r=4, target_modules=["0", "2", "3"], init_lora_weights=False)
    model = peft.get_peft_model(base.double(), config).double()
    twin = copy.deepcopy(model)
    pairs = [p for pair in riemannian._collect_lora_pairs(model) for p in pair]
    assert len(pairs) == 6
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.05}
    ours = PreconditionedAdamW([pair_group(pairs)], damping=1e-2, **options)
    theirs = riemannian.create_riemannian_optimizer(twin, torch.optim.AdamW, reg=1e-2, **options)
    x, y = torch.randn(32, 10).double(), torch.randn(32, 6).double()
    for _ in range(10):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            ((net(x) - y) ** 2).mean().backward()
            optimizer.step()
        for got, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("grouped", [False, True])
def test_plain_groups_are_torch_adamw_bit_for_bit(grouped):
    params = make_pairs()
    twins = copy.deepcopy(params)
    ours = PreconditionedAdamW(
        [{"params": params[:3]}, {"params": params[3:], "lr": 0.1}] if grouped else iter(params),
        lr=0.02,
        weight_decay=0.1,
        fused=True,
    )
    theirs = torch.optim.AdamW(
        [{"params": twins[:3]}, {"params": twins[3:], "lr": 0.1}] if grouped else twins,
        lr=0.02,
        weight_decay=0.1,
        fused=True,
    )
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_closure_runs_once_and_first_and_raw_gradients_stay():
    params, targets, closure = make_problem()
    twins = copy.deepcopy(params)
    for p in params:
        p.grad = None  # the gradients exist only once the closure has run
    calls = []

    def counted():
        assert torch.is_grad_enabled()
        calls.append([p.detach().clone() for p in params])
        return closure()

    optimizer = PreconditionedAdamW([pair_group(params)], lr=0.01)
    loss = optimizer.step(counted)
    assert len(calls) == 1
    assert all(torch.equal(p, q) for p, q in zip(calls[0], twins, strict=True))
    assert torch.equal(loss, make_closure(twins, targets)())
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.grad, q.grad)  # raw, as autograd left them
    PreconditionedAdamW([pair_group(twins)], lr=0.01).step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_raw_gradients_return_when_the_inner_step_fails(monkeypatch):
    params = make_pairs()
    grads = [p.grad for p in params]

    def fail(self, closure=None):
        assert params[0].grad is not grads[0]
        raise OSError("stop")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    optimizer = PreconditionedAdamW([pair_group(params)])
    with pytest.raises(OSError, match="stop"):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))


def test_state_of_another_optimizer_is_refused():
    params = make_pairs()
    theirs = torch.optim.AdamW(params)
    theirs.step()
    with pytest.raises(ValueError, match="lora_pairs"):
        PreconditionedAdamW([pair_group(params)]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("relative", [None, 0.2])
def test_a_state_brings_its_damping_back_and_an_earlier_one_has_no_relative_damping(relative):
    params = make_pairs()
    options = {"damping": 0.5, "relative_damping": relative}
    optimizer = PreconditionedAdamW([pair_group(params)], **options)
    set_grads(params)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if relative is None:
        del state["param_groups"][0]["relative_damping"]
    twins = copy.deepcopy(params)
    resumed = PreconditionedAdamW([pair_group(twins)], damping=9.0, relative_damping=9.0)
    resumed.load_state_dict(state)
    set_grads(params, 2)
    set_grads(twins, 2)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_pickled_optimizer_goes_on():
    params = make_pairs()
    optimizer = PreconditionedAdamW([pair_group(params)], damping=0.5)
    optimizer.step()
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.add_param_group(pair_group(make_pairs()))
    assert [g["damping"] for g in twin.param_groups] == [0.5, 0.5]
    set_grads(twin.param_groups[0]["params"])
    set_grads(params)
    optimizer.step()
    twin.step()
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_gradients_may_come_and_go_between_steps():
    """A factor without one waits, and so does a frozen one; the others of its pair and group move."""
    params = make_pairs()
    params[0].requires_grad_(False)
    optimizer = PreconditionedAdamW([pair_group(params)], lr=0.01)
    for missing in ([0, 3, 4, 5], [0], [0, 5], [0], list(range(8))):
        set_grads(params)
        for i in missing:
            params[i].grad = None
        before = copy.deepcopy(params)
        optimizer.step()
        same = [i for i, (p, q) in enumerate(zip(params, before, strict=True)) if torch.equal(p, q)]
        assert same == missing
        assert all(params[i].grad is None for i in missing)
    assert params[0] not in optimizer.state


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_pairs(SHAPES[:2], torch.float32),
        lambda: make_pairs(SHAPES[:2], torch.bfloat16) + make_pairs(SHAPES[:2], torch.float16),
        lambda: [nn.Parameter(torch.randn(20, 4).mT), nn.Parameter(torch.randn(4, 12).mT)],
    ],
    ids=["float32", "16 bits", "transposed"],
)
def test_dtypes_and_layouts_with_the_fused_kernel(make):
    params = make()
    set_grads(params)
    reference = TextbookAdamW(params, 0.01, 1e-2)
    reference.step([p.grad for p in params])
    optimizer = PreconditionedAdamW([pair_group(params)], lr=0.01, damping=1e-2)
    assert optimizer.param_groups[0]["fused"]
    optimizer.step()
    for got, want in zip(params, reference.p, strict=True):
        tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaling_does_not_change_the_step(fused):
    params, targets, _ = make_problem()
    twins = copy.deepcopy(params)
    ours = PreconditionedAdamW([pair_group(params)], lr=0.01, fused=fused)
    # Lightning refuses to clip when the kernel unscales; only a request for `fused` brings that.
    assert getattr(ours, "_step_supports_amp_scaling", False) is bool(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    theirs = PreconditionedAdamW([pair_group(twins)], lr=0.01)
    for step in range(3):
        ours.zero_grad()
        scaler.scale(quadratic_loss(params, targets)).backward()
        if step == 1:
            params[0].grad[0, 0] = float("inf")  # the scaler must skip this step
        scaler.step(ours)
        scaler.update()
        if step != 1:
            theirs.step(make_closure(twins, targets))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_default_kernel():
    params = make_pairs()
    assert PreconditionedAdamW([pair_group(params)]).param_groups[0]["fused"] is True
    foreach = PreconditionedAdamW([pair_group(params)], foreach=True).param_groups[0]
    assert (foreach["foreach"], foreach["fused"]) == (True, None)
    assert PreconditionedAdamW(params, fused=False).param_groups[0]["fused"] is False
    complex_param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert PreconditionedAdamW([complex_param]).param_groups[0]["fused"] is None


@pytest.mark.parametrize("damping", [-1.0, float("nan")])
def test_negative_damping_is_an_error(damping):
    optimizer = PreconditionedAdamW(make_pairs())
    with pytest.raises(ValueError, match="damping must be >= 0"):
        optimizer.add_param_group(pair_group(make_pairs(), damping=damping))
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="damping must be >= 0"):
        PreconditionedAdamW(make_pairs(), damping=damping)


@pytest.mark.parametrize("relative", [-1.0, float("nan")])
def test_relative_damping_that_cannot_be_is_an_error(relative):
    with pytest.raises(ValueError, match="relative_damping must be >= 0"):
        PreconditionedAdamW(make_pairs(), relative_damping=relative)
    with pytest.raises(
        ValueError, match=r"relative_damping is 0\.1, but damping is 0: set damping"
    ):
        PreconditionedAdamW(make_pairs(), damping=0.0, relative_damping=0.1)
