"""One process, DDP and FSDP2 train alike: same gradient, initialization, losses and scores."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from tests.support import run_folders
from tests.support.parity import (
    STRATEGIES,
    assert_alike,
    assert_equal_on_all,
    init_errors,
    losses,
    parity_job,
    relative_error,
    two_processes,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize("model", ["llama", "t5", "gpt2"])
def test_tiny_models(model, parity_config, models_without_dropout, finished, reference, tmp_path):
    jobs = []
    for strategy in STRATEGIES:
        root = tmp_path / strategy
        name, options = models_without_dropout / model, two_processes(strategy)
        jobs.append(parity_job(parity_config, name, root, 4, *options))
    finished(jobs)
    for strategy in STRATEGIES:
        assert_alike(tmp_path / strategy, reference(model), 2)


def test_four_processes(parity_config, models_without_dropout, finished, reference, tmp_path):
    options = ("--config=strategies/fsdp.yaml", "--trainer.devices=4")
    job = parity_job(parity_config, models_without_dropout / "llama", tmp_path, 2, *options)
    finished([job], processes=4)
    assert_alike(tmp_path, reference("llama"), 4)


def test_the_initialization_alone(parity_config, models_without_dropout, finished, tmp_path):
    """`init` on two processes writes one adapter, that of one process."""

    def job(where, *more):
        made = parity_job(
            parity_config, models_without_dropout / "llama", tmp_path / where, 8, *more
        )
        return {
            **made,
            "argv": ["init", *made["argv"][1:], f"--output={tmp_path / where / 'made'}"],
        }

    def products(where):
        factors = load_file(tmp_path / where / "made" / "adapter_model.safetensors")
        names = (name for name in factors if "lora_B" in name)
        return {name: factors[name] @ factors[name.replace("lora_B", "lora_A")] for name in names}

    finished([job("alone")], processes=1)
    finished([job(strategy, *two_processes(strategy)) for strategy in STRATEGIES])
    wanted = products("alone")
    assert len(wanted) == 14
    for strategy in STRATEGIES:
        made = products(strategy)
        assert made.keys() == wanted.keys()
        assert max(relative_error(made[name], value) for name, value in wanted.items()) < 1e-4


def test_a_mean_over_rows(parity_config, models_without_dropout, finished, tmp_path):
    """Answers of 1 to 12 words: one process and two weigh each row alike."""
    rows = [{"instruction": f"Say {i}.", "output": "so " * (i % 12 + 1)} for i in range(61)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = yaml.safe_load(parity_config.read_text())
    config["data"] = {
        "class_path": "InstructionDataModule",
        "init_args": {"path": str(tmp_path / "rows.json"), "eval_batch_size": 7},
    }
    config["model"]["loss_weighting"] = "rows"
    config["init"]["init_args"] |= {"weighting": "rows", "samples": "first"}
    file = tmp_path / "rows.yaml"
    file.write_text(yaml.safe_dump(config))

    def job(where, batch_size, *more):
        return parity_job(
            file, models_without_dropout / "llama", tmp_path / where, batch_size, *more
        )

    finished([job("alone", 8)], processes=1)
    finished([job(strategy, 4, *two_processes(strategy)) for strategy in STRATEGIES])
    for strategy in STRATEGIES:
        assert_alike(tmp_path / strategy, tmp_path / "alone", 2)


def test_a_base_of_four_bits(parity_config, wide_models, finished, tmp_path):
    """Each process quantises the whole model to the same codes."""

    def job(where, batch_size, *more):
        more = ("--config=models/nf4.yaml", *more)
        return parity_job(parity_config, wide_models / "llama", tmp_path / where, batch_size, *more)

    finished([job("alone", 8)], processes=1)
    finished([job("ddp", 4, *two_processes("ddp"))])
    assert_alike(tmp_path / "ddp", tmp_path / "alone", 2)


def test_the_search_of_gamma(parity_config, models_without_dropout, finished, tmp_path):
    """One process, DDP and FSDP2 try the same gammas, find the same losses and decide alike."""

    def job(where, batch_size, *more):
        searched = ("--init.gamma=auto", "--trainer.max_steps=1", *more)
        return parity_job(
            parity_config, models_without_dropout / "llama", tmp_path / where, batch_size, *searched
        )

    def found(where):
        init = run_folders.summary(tmp_path / where / "tiny" / "version_0")["init"]
        trials = init["gamma_search"]["trials"]
        losses = [init["gamma_search"]["untouched"], *(trial["loss"] for trial in trials)]
        return init["gamma"], [trial["gamma"] for trial in trials], losses

    finished([job("alone", 8)], processes=1)
    finished([job(strategy, 4, *two_processes(strategy)) for strategy in STRATEGIES])
    gamma, tried, alone = found("alone")
    assert len(alone) == 4
    for strategy in STRATEGIES:
        assert found(strategy)[:2] == (gamma, tried)
        assert found(strategy)[2] == pytest.approx(alone, rel=1e-5)


METHODS = {
    "pissa": (),
    "lora_ga": ("--init.num_samples=13", "--init.estimator.kind=exact"),
    "adalora": ("--model.adapter.adalora.init_r=6",),
    "lora_pro": (),
    "loram": (),
    "reflora": ("--model.optimizer.warmup_steps=1",),
    "lora_sb": ("--init.num_samples=13",),
    "dora": (),
}


def test_methods_on_ddp(parity_config, models_without_dropout, finished, tmp_path):
    """Subtracted factors, prunings, moments in weight space and magnitudes are the same on both processes."""

    def job(where, method, batch_size, *more):
        argv = [
            *("fit", f"--config={parity_config}", f"--config=methods/{method}.yaml"),
            *METHODS[method],
            *(f"--model.name={models_without_dropout / 'llama'}", "--trainer.max_steps=3"),
            *(f"--data.batch_size={batch_size}", f"--output.root={tmp_path / where / method}"),
        ]
        return {"argv": [*argv, *more], "keep": str(tmp_path / where / method / "kept")}

    finished([job("alone", method, 8) for method in METHODS], processes=1)
    finished([job("both", method, 4, *two_processes("ddp")) for method in METHODS])
    for method in METHODS:
        ours, wanted = (losses(tmp_path / where / method) for where in ("both", "alone"))
        assert len(wanted) == 3
        assert ours == pytest.approx(wanted, rel=1e-4), method
        assert_equal_on_all(tmp_path / "both" / method / "kept", "trained")


EXACT_VARIANTS = {
    "recomputed": ["--model.gradient_checkpointing=true"],
    "offloaded": ["--trainer.strategy.cpu_offload=true"],
    "kept": ["--trainer.strategy.reshard_after_forward=false"],
}
ROUNDED_VARIANTS = {  # with the largest mean error of the initialization
    "sketched": (["--init.estimator.kind=sketch"], 0.05),
    "sketched_3": (["--init.estimator.kind=sketch", "--init.estimator.passes=3"], 0.005),
    "bfloat16": (["--trainer.strategy.param_dtype=bfloat16"], 0.1),
}


def test_options_of_fsdp(parity_config, models_without_dropout, finished, reference, tmp_path):
    """They change memory and speed, and the sketch and 16 bits the result within their error."""
    variants = EXACT_VARIANTS | {name: options for name, (options, _) in ROUNDED_VARIANTS.items()}
    jobs = []
    for name, options in variants.items():
        root, model = tmp_path / name, models_without_dropout / "llama"
        more = (*two_processes("fsdp"), *options)
        jobs.append(parity_job(parity_config, model, root, 4, *more, first_reads=True))
    finished(jobs)
    alone = reference("llama")
    for name in EXACT_VARIANTS:
        assert_alike(tmp_path / name, alone, 2)
    for name, (_, limit) in ROUNDED_VARIANTS.items():
        errors = init_errors(tmp_path / name / "kept", alone / "kept")
        assert sum(errors) / len(errors) < limit, name
        assert losses(tmp_path / name) == pytest.approx(losses(alone), rel=0.02)


@pytest.mark.smollm2
def test_smollm2(smollm2_dir, finished, tmp_path):
    steps = 2

    def job(where, batch_size, *more):
        own = (
            "--model.optimizer.lr=1e-4",  # higher ones amplify the rounding of sums beyond the tolerance
            *("--data.validation_size=7", "--data.max_length=48", "--init.num_samples=5"),
            *("--init.micro_batch_size=2", "--init.gamma=128"),
            *("--output.wandb=disabled", "--output.name=tiny", f"--trainer.max_steps={steps}"),
        )
        root = tmp_path / where
        return parity_job("quickstart.yaml", smollm2_dir, root, batch_size, *own, *more)

    finished([job("alone", 2)], processes=1, timeout=900)
    finished([job(name, 1, *two_processes(name)) for name in STRATEGIES], timeout=900)
    for strategy in STRATEGIES:
        assert_alike(tmp_path / strategy, tmp_path / "alone", 2, steps)
