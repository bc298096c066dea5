"""Runs whose results are compared between one process and several, and how these are compared."""

from pathlib import Path

import pytest
import torch

from tests.support import run_folders

STEPS = 6  # two epochs and a part
STRATEGIES = ("ddp", "fsdp")


def parity_job(config, model, root: Path, batch_size: int, *more: str, **ends) -> dict:
    """Return a worker's job of a run whose sizes nothing divides; what is kept of it is in root / "kept"."""
    argv = [
        *("fit", f"--config={config}", f"--model.name={model}", f"--trainer.max_steps={STEPS}"),
        *("--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.5"),
        *("--trainer.accelerator=cpu", f"--data.batch_size={batch_size}"),
        *("--data.validation_size=17", "--init.num_samples=13", "--init.estimator.kind=exact"),
        *("--init.gamma=32", f"--output.root={root}"),
    ]
    return {"argv": [*argv, *more], "keep": str(root / "kept"), **ends}


def losses(root: Path) -> list[float]:
    """Return the training losses of the only run below a folder, in which each step is there once."""
    (folder,) = (root / "tiny").iterdir()
    by_step = run_folders.losses(folder)
    assert list(by_step) == list(range(len(by_step)))
    return list(by_step.values())


def two_processes(strategy: str) -> tuple[str, str]:
    """Return the options of a run on two processes."""
    return f"--config=strategies/{strategy}.yaml", "--trainer.devices=2"


def relative_error(values: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return |values - wanted| / |wanted|, in float64."""
    return float((values.double() - wanted.double()).norm() / wanted.double().norm())


def assert_equal_on_all(kept: Path, name: str, processes: int = 2) -> dict:
    """Assert that a file of factors is the same on every process; return those of the first."""
    files = [torch.load(kept / f"{name}_{rank}.pt") for rank in range(processes)]
    for layer, factors in files[0].items():
        for other in files[1:]:
            assert all(map(torch.equal, factors, other[layer])), (name, layer)
    return files[0]


def init_errors(kept: Path, reference: Path, processes: int = 2) -> list[float]:
    """Return each layer's relative error of the initialization's lora_B @ lora_A."""
    init = assert_equal_on_all(kept, "factors", processes)
    wanted = torch.load(reference / "factors_0.pt")
    assert init.keys() == wanted.keys()
    return [
        relative_error(init[name][1] @ init[name][0], lora_B @ lora_A)
        for name, (lora_A, lora_B) in wanted.items()
    ]


def assert_alike(root: Path, reference: Path, processes: int, steps: int = STEPS) -> None:
    """Compare a run on several processes with the same one on one process."""
    kept = root / "kept"
    shares = [torch.load(kept / f"gradients_{rank}.pt") for rank in range(processes)]
    assert all(shares), "every process owns layers"
    gradients = {name: value for share in shares for name, value in share.items()}
    wanted = torch.load(reference / "kept" / "gradients_0.pt")
    assert gradients.keys() == wanted.keys()
    assert sum(map(len, shares)) == len(wanted)
    for name, gradient in wanted.items():
        assert relative_error(gradients[name], gradient) < 1e-5
    assert max(init_errors(kept, reference / "kept", processes)) < 1e-4
    assert_equal_on_all(kept, "trained", processes)
    assert losses(root) == pytest.approx(losses(reference), rel=1e-4)
    assert len(losses(root)) == steps
    ours, theirs = (run_folders.summary(at / "tiny" / "version_0") for at in (root, reference))
    for moment, scores in theirs["metrics"].items():
        assert ours["metrics"][moment] == pytest.approx(scores, rel=1e-4), moment
    file = Path("tiny", "version_0", "row_scores", "final.csv")
    rows, wanted_rows = (run_folders.row_scores(at / file) for at in (root, reference))
    run_folders.check_rows(root / file, ours["metrics"]["final"], len(wanted_rows["row"]))
    for name, column in wanted_rows.items():
        assert rows[name] == pytest.approx(column, rel=1e-3, abs=1e-6), name
    assert ours["train"]["samples"] == theirs["train"]["samples"]
    assert len(ours["init"]["peak_bytes"]) == processes
