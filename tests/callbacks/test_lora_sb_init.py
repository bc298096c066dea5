"""LoraSbInit through the command: the start against the float64 gradient's signs, what moves afterwards."""

import pytest
import torch

from callbacks.initialization import GradientInit
from tests.support.one_step_oracle import untouched_gradients
from tests.support.run_folders import summary, table

RUN = ("--config=methods/lora_sb.yaml", "--init.num_samples=16", "--model.optimizer.lr=1e-2")
SCALING = 16 / 4**0.5  # of the tiny run's adapter: lora_alpha 16, r 4, rsLoRA


def factors(weights):
    """Return lora_A and lora_B by layer."""
    ends = {side: f".lora_{side}.default.weight" for side in "AB"}
    return {
        name.removeprefix("base_model.model.").removesuffix(ends["A"]): (
            weights[name].double(),
            weights[name.replace("lora_A", "lora_B")].double(),
        )
        for name in weights
        if name.endswith(ends["A"])
    }


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        (("--model.warmup_steps=0", "--model.lr_scheduler_type=linear"), 1e-2),
        (("--model.warmup_steps=2", "--model.lr_scheduler_type=cosine"), 5e-3),
    ],
)
def test_the_start_is_adamws_first_step_and_nothing_leaves_its_span(
    schedule, rate, fit, watched_fit, run_models, monkeypatch
):
    kept = []
    original = GradientInit.batches
    monkeypatch.setattr(
        GradientInit, "batches", lambda *given: kept.append(list(original(*given))) or kept[-1]
    )
    folder = fit(*RUN, *schedule)
    record = summary(folder)["init"]
    assert record["rate"] == pytest.approx(rate)
    gradients = untouched_gradients(run_models / "llama", kept[-1])
    first, last = factors(watched_fit["first"]), factors(watched_fit["last"])
    assert len(first) == 14
    for name, (A, B) in first.items():
        signs = gradients[name].sign()
        U, S, Vh = torch.linalg.svd(signs)
        captured = -SCALING / rate * U[:, :4].T @ B @ A @ Vh[:4].T
        # Entries that are all but 0 may have another sign in float32.
        assert torch.allclose(captured, torch.diag(S[:4]), atol=0.1 * float(S[0])), name
        assert torch.allclose(A @ A.T, torch.eye(4).double(), atol=1e-5)
        end_A, end_B = last[name]
        assert torch.equal(end_A, A)
        assert not torch.allclose(end_B, B, rtol=1e-2, atol=0)
        Q = torch.linalg.qr(B).Q
        assert torch.allclose(Q @ (Q.T @ end_B), end_B, atol=1e-5)


@pytest.mark.slow
def test_its_signs_are_no_reference_of_alignment(fit, passes):
    """The monitor takes the gradient itself, by a pass of its own."""
    watch = ("--config", "callbacks/alignment.yaml", "--trainer.callbacks.num_samples=16")
    folder = fit(*RUN, *watch)
    assert sorted(passes) == ["callbacks.alignment_monitor", "callbacks.initialization"]
    assert len(table(folder, "alignment.csv")) >= 14
