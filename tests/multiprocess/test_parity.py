"""One process, DDP and FSDP2 train alike: same gradient, same start, same losses, same scores."""

import csv
import json

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.worker import keep_from_now_on

STRATEGIES = ("ddp", "fsdp")
STEPS = 20


def arguments(tiny_run, model, root, batch_size, *more):
    """Return the options of a run whose sizes nothing divides."""
    return [
        "fit",
        f"--config={tiny_run}",
        f"--model.name={model}",
        f"--trainer.max_steps={STEPS}",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=0.5",
        "--trainer.accelerator=cpu",
        f"--data.batch_size={batch_size}",
        "--data.validation_size=17",
        "--init.num_samples=13",
        "--init.estimator.kind=exact",
        "--init.gamma=32",
        f"--output.root={root}",
        *more,
    ]


def losses(root):
    """Return the training losses of the only run below a folder."""
    (folder,) = (root / "tiny").iterdir()
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def summary(root):
    (folder,) = (root / "tiny").iterdir()
    return json.loads((folder / "summary.json").read_text())


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_alike(root, alone, processes):
    """Compare a run on several processes with that on one."""
    kept, reference = root / "kept", alone / "kept"
    shares = [torch.load(kept / f"gradients_{rank}.pt") for rank in range(processes)]
    assert all(shares), "every process owns layers"
    gradients = {name: value for share in shares for name, value in share.items()}
    wanted = torch.load(reference / "gradients_0.pt")
    assert gradients.keys() == wanted.keys()
    assert sum(map(len, shares)) == len(wanted)
    for name, gradient in wanted.items():
        assert relative(gradients[name], gradient) < 1e-5
    start = [torch.load(kept / f"factors_{rank}.pt") for rank in range(processes)]
    trained = [torch.load(kept / f"trained_{rank}.pt") for rank in range(processes)]
    for moments in (start, trained):
        for name, factors in moments[0].items():
            for other in moments[1:]:
                assert all(map(torch.equal, factors, other[name])), "the same on every process"
    for name, (lora_A, lora_B) in torch.load(reference / "factors_0.pt").items():
        found_A, found_B = start[0][name]
        assert relative(found_B @ found_A, lora_B @ lora_A) < 1e-4
    assert losses(root) == pytest.approx(losses(alone), rel=1e-4)
    assert len(losses(root)) == STEPS
    found, wanted = summary(root), summary(alone)
    for moment, scores in wanted["metrics"].items():
        assert found["metrics"][moment] == pytest.approx(scores, rel=1e-4), moment
    assert found["train"]["samples"] == wanted["train"]["samples"]
    assert len(found["init"]["peak_bytes"]) == processes


@pytest.mark.parametrize("model", ["llama", "t5", "gpt2"])
def test_tiny_models(
    model, tiny_run, models_without_dropout, command, torchrun, tmp_path, monkeypatch
):
    run_models = models_without_dropout
    alone = tmp_path / "alone"
    keep_from_now_on(alone / "kept", monkeypatch.setattr)
    assert command(*arguments(tiny_run, run_models / model, alone, 8)) == 0
    jobs = []
    for strategy in STRATEGIES:
        root = tmp_path / strategy
        options = (f"--config=strategies/{strategy}.yaml", "--trainer.devices=2")
        argv = arguments(tiny_run, run_models / model, root, 4, *options)
        jobs.append({"argv": argv, "keep": str(root / "kept")})
    status, told = torchrun(jobs)
    assert status == 0, told[-6000:]
    for strategy in STRATEGIES:
        assert_alike(tmp_path / strategy, alone, 2)


def test_four_processes(tiny_run, models_without_dropout, command, torchrun, tmp_path, monkeypatch):
    model, alone = models_without_dropout / "llama", tmp_path / "alone"
    keep_from_now_on(alone / "kept", monkeypatch.setattr)
    assert command(*arguments(tiny_run, model, alone, 8)) == 0
    options = ("--config=strategies/fsdp.yaml", "--trainer.devices=4")
    argv = arguments(tiny_run, model, tmp_path / "four", 2, *options)
    status, told = torchrun([{"argv": argv, "keep": str(tmp_path / "four" / "kept")}], 4)
    assert status == 0, told[-6000:]
    assert_alike(tmp_path / "four", alone, 4)


METHODS = {
    "pissa": (),
    "lora_ga": ("--init.num_samples=13", "--init.estimator.kind=exact"),
    "adalora": ("--model.adapter.adalora.init_r=6",),
    "lora_pro": (),
    "dora": (),
}


def test_methods_on_ddp(tiny_run, models_without_dropout, command, by_hand, tmp_path):
    """Offsets, prunings, moments in weight space and magnitudes are the same on both processes."""

    def argv(root, method, batch_size, *more):
        return [
            *("fit", f"--config={tiny_run}", f"--config=methods/{method}.yaml", *METHODS[method]),
            *(f"--model.name={models_without_dropout / 'llama'}", "--trainer.max_steps=3"),
            *(f"--data.batch_size={batch_size}", f"--output.root={root / method}", *more),
        ]

    jobs = []
    for method in METHODS:
        assert command(*argv(tmp_path / "alone", method, 8)) == 0
        options = (f"--config={ROOT}/configs/strategies/ddp.yaml", "--trainer.devices=2")
        both = argv(tmp_path / "both", method, 4, *options)
        jobs.append({"argv": both, "keep": str(tmp_path / "kept" / method)})
    for status, told in by_hand(jobs):
        assert status == 0, told[-6000:]
    for method in METHODS:
        found, wanted = (losses(tmp_path / where / method) for where in ("both", "alone"))
        assert len(wanted) == 3
        assert found == pytest.approx(wanted, rel=1e-4), method
        trained = [torch.load(tmp_path / "kept" / method / f"trained_{i}.pt") for i in (0, 1)]
        for name, factors in trained[0].items():
            assert all(map(torch.equal, factors, trained[1][name])), (method, name)


VARIANTS = {
    "recomputed": ["--model.gradient_checkpointing=true"],
    "offloaded": ["--trainer.strategy.cpu_offload=true"],
    "kept": ["--trainer.strategy.reshard_after_forward=false"],
    "sketched": ["--init.estimator.kind=sketch"],
    "sketched_3": ["--init.estimator.kind=sketch", "--init.estimator.passes=3"],
    "bfloat16": ["--trainer.strategy.param_dtype=bfloat16"],
}


def test_options_of_fsdp(
    tiny_run, models_without_dropout, command, torchrun, tmp_path, monkeypatch
):
    """They change memory and speed, and the sketch and 16 bits the result within their error."""
    model, alone = models_without_dropout / "llama", tmp_path / "alone"
    keep_from_now_on(alone / "kept", monkeypatch.setattr)
    assert command(*arguments(tiny_run, model, alone, 8)) == 0
    jobs = []
    for name, options in VARIANTS.items():
        root = tmp_path / name
        strategy = ("--config=strategies/fsdp.yaml", "--trainer.devices=2")
        argv = arguments(tiny_run, model, root, 4, *strategy, *options)
        jobs.append({"argv": argv, "keep": str(root / "kept"), "first_reads": True})
    status, told = torchrun(jobs)
    assert status == 0, told[-6000:]
    for name in ("recomputed", "offloaded", "kept"):
        assert_alike(tmp_path / name, alone, 2)
    wanted = torch.load(alone / "kept" / "factors_0.pt")
    for name, limit in (("sketched", 0.05), ("sketched_3", 0.005), ("bfloat16", 0.1)):
        start = [torch.load(tmp_path / name / "kept" / f"factors_{rank}.pt") for rank in (0, 1)]
        errors = []
        for layer, (lora_A, lora_B) in wanted.items():
            assert all(map(torch.equal, start[0][layer], start[1][layer]))
            found_A, found_B = start[0][layer]
            errors.append(relative(found_B @ found_A, lora_B @ lora_A))
        print(name, sum(errors) / len(errors), max(errors))
        assert sum(errors) / len(errors) < limit
        assert losses(tmp_path / name) == pytest.approx(losses(alone), rel=0.02)


@pytest.mark.smollm2
def test_smollm2(smollm2_dir, command, torchrun, tmp_path, monkeypatch):
    def argv(root, batch_size, *more):
        return [
            "fit",
            "--config=quickstart.yaml",
            f"--model.name={smollm2_dir}",
            f"--trainer.max_steps={STEPS}",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.gradient_clip_val=0.5",
            "--trainer.accelerator=cpu",
            f"--data.batch_size={batch_size}",
            "--model.optimizer.lr=1e-4",  # higher ones amplify the rounding of sums beyond the tolerance
            "--data.validation_size=11",
            "--data.max_length=48",
            "--init.num_samples=5",
            "--init.micro_batch_size=2",
            "--init.estimator.kind=exact",
            "--output.wandb=disabled",
            "--output.name=tiny",
            f"--output.root={root}",
            *more,
        ]

    alone = tmp_path / "alone"
    with monkeypatch.context() as patch:
        keep_from_now_on(alone / "kept", patch.setattr)
        assert command(*argv(alone, 2)) == 0
    jobs = []
    for strategy in STRATEGIES:
        root = tmp_path / strategy
        options = (f"--config=strategies/{strategy}.yaml", "--trainer.devices=2")
        jobs.append({"argv": argv(root, 1, *options), "keep": str(root / "kept")})
    status, told = torchrun(jobs)
    assert status == 0, told[-6000:]
    for strategy in STRATEGIES:
        assert_alike(tmp_path / strategy, alone, 2)
