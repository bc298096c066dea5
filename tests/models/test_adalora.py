"""AdaLoRA through the command against PEFT's own in a plain loop; its schedule, export and resumption."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from peft import AdaLoraConfig, AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.models.adalora import AVERAGES
from app.models.adapter_io import WEIGHTS_FILE, load_adapter
from app.models.loading import empty_model
from app.models.source import resolve_model
from app.training.module import LoraModule
from callbacks.adalora_pruning import AdaLoraPruning
from tests.support import run_folders
from tests.support.alpha_r_reader import with_adapter
from tests.support.watched_fit import logits, train_pefts_own

STEPS = 10
LAYERS = 14
INIT, TARGET = 6, 4
ADALORA = (
    "--config=methods/adalora.yaml",
    f"--model.adapter.adalora.init_r={INIT}",
    "--model.adapter.adalora.tinit=2",
    "--model.adapter.adalora.tfinal=2",
    "--model.optimizer.init_args.lr=0.01",
    "--model.lr_scheduler_type=constant",
    f"--trainer.max_steps={STEPS}",
    "--output.checkpoint_every_n_steps=1",
)


def values(folder, name):
    return [value for _, value in run_folders.values(folder, name).values()]


def budget(step):
    """The cubic schedule, by hand."""
    if step <= 2:
        return LAYERS * INIT
    left = 1 - (step - 2) / (STEPS - 2 - 2)
    return int(LAYERS * (INIT - TARGET) * left**3 + LAYERS * TARGET)


def test_ten_steps_are_pefts_and_the_budget_is_kept(fit, watched_fit, run_models):
    folder = fit(*ADALORA)
    base = AutoModelForCausalLM.from_pretrained(run_models / "llama")
    config = AdaLoraConfig(
        init_r=INIT,
        target_r=TARGET,
        tinit=2,
        tfinal=2,
        deltaT=1,
        lora_alpha=16,
        target_modules="all-linear",
        total_step=STEPS,
        task_type="CAUSAL_LM",
    )
    left = []

    def prune(model, step):  # PEFT's own regulariser is in its loss
        model.base_model.update_and_allocate(step)
        values = [p for name, p in model.named_parameters() if "lora_E" in name]
        left.append(sum(int((p != 0).sum()) for p in values))

    theirs = train_pefts_own(watched_fit, base, config, lr=0.01, after_step=prune)
    named = dict(theirs.named_parameters())
    for name, value in watched_fit["last"].items():
        assert torch.allclose(named[name], value, rtol=1e-3, atol=1e-5), name
    triplets = values(folder, "adalora/triplets")
    assert triplets == left
    # A mask keeps the budget: ties aside, what is left is the schedule.
    assert [int(value) for value in triplets[2:]] == [budget(step) for step in range(3, 9)] + [
        LAYERS * TARGET
    ] * 2
    assert triplets[-1] == LAYERS * TARGET < LAYERS * INIT
    assert len(values(folder, "train/orthogonality")) == STEPS


def test_peft_loads_what_is_left_and_servers_what_is_exported(
    fit, command, capsys, watched_fit, run_models, tmp_path
):
    folder = fit(*ADALORA)
    summary = run_folders.summary(folder)
    # q, o: 16 + 16; k, v: 16 + 8; gate, up, down: 16 + 32; and a value for each triplet
    assert summary["model"]["trainable_parameters"] == 2 * INIT * (2 * 32 + 2 * 24 + 3 * 48 + 7)
    base = AutoModelForCausalLM.from_pretrained(run_models / "llama")
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert torch.allclose(logits(loaded), watched_fit["logits"], atol=1e-5)
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = sum(len(value) for name, value in state.items() if "lora_E" in name)
    assert kept == LAYERS * TARGET
    assert command("export", "--run", folder, "--as", "lora", "--output", tmp_path / "lora") == 0
    ranks = [len(value) for name, value in state.items() if "lora_E" in name]
    assert f"max_lora_rank of {max(ranks)} or more" in capsys.readouterr().out
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "A LoRA adapter" in card
    assert "AdaLoRA: Zhang" in card
    for model in (
        with_adapter(loaded.unload(), tmp_path / "lora"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"),
    ):
        assert torch.allclose(logits(model), watched_fit["logits"], atol=1e-5)
    # A checkpoint without the pruning's state, as save_weights_only leaves it, has what is pruned as zeros.
    [file] = (folder / "checkpoints").iterdir()
    content = torch.load(file, weights_only=True)
    for part in ("callbacks", "loops", "optimizer_states", "lr_schedulers"):
        del content[part]
    torch.save(content, tmp_path / "weights.ckpt")
    for name, kind in (("weights", ()), ("plain", ("--as", "lora"))):
        given = ("--ckpt_path", tmp_path / "weights.ckpt", *kind, "--output", tmp_path / name)
        assert command("export", "--run", folder, *given) == 0
        own = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(logits(own), watched_fit["logits"], atol=1e-5)
    served, wanted = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("plain", "lora"))
    assert all(torch.equal(served[name], wanted[name]) for name in {**served, **wanted})
    # Without numbers, as `plan` and the checks of a merge read it, no triplet is pruned.
    empty = empty_model(resolve_model(str(run_models / "llama")))
    read = load_adapter(empty, folder / "adapter", trainable=True)
    triplets = sum(p.numel() for name, p in read.named_parameters() if "lora_" in name)
    assert triplets == summary["model"]["trainable_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 8, 9])
def test_a_run_goes_on_bit_for_bit(step, fitted, fit, killed_at):
    whole = fitted(*ADALORA)
    with killed_at(step):
        fit(*ADALORA)
    parts = fit(*ADALORA, "--ckpt_path=last")
    assert parts.name == "version_0"
    found, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (parts, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_accumulation_adds_the_regulariser_once(fit, watched_fit):
    """Two halves of a batch are the batch, also for what does not depend on the data."""
    steps = (*ADALORA, "--trainer.max_steps=5", "--data.train_size=4")
    whole = fit(*steps, "--data.batch_size=4")
    wanted = watched_fit["last"]
    watched_fit["batches"].clear()
    halves = fit(*steps, "--data.batch_size=2", "--trainer.accumulate_grad_batches=2")
    assert len(watched_fit["batches"]) == 10
    name = "train/orthogonality"
    assert values(halves, name) == pytest.approx(values(whole, name), rel=1e-5)
    for name, value in wanted.items():
        assert torch.allclose(watched_fit["last"][name], value, rtol=0, atol=1e-5), name


def test_a_skipped_step_is_not_weighed(fit, monkeypatch):
    """A gradient scaler leaves gradients that are not finite behind: they would stay in the averages."""
    original = AdaLoraPruning.on_train_batch_end
    kept = []

    def overflowed(callback, trainer, pl_module, *rest):
        if trainer.global_step == 4:
            pl_module.model.get_parameter(kept[0]).grad.fill_(torch.inf)
        original(callback, trainer, pl_module, *rest)
        if trainer.global_step == 7:
            kept.append(callback.state_dict())

    def choose(module):
        kept.append(next(n for n, p in module.model.named_parameters() if p.requires_grad))

    monkeypatch.setattr(AdaLoraPruning, "on_train_batch_end", overflowed)
    monkeypatch.setattr(LoraModule, "on_train_start", choose)
    triplets = values(fit(*ADALORA), "adalora/triplets")
    # That optimizer step had moved what was pruned, and nothing was pruned again.
    assert triplets[3] == LAYERS * INIT
    assert [int(value) for value in triplets[4:7]] == [budget(step) for step in (5, 6, 7)]
    assert triplets[-1] == LAYERS * TARGET
    for average in AVERAGES:
        assert all(value.isfinite().all() for value in kept[1][average].values()), average


def test_no_step_to_weigh_by(error_of, tiny_run, monkeypatch):
    monkeypatch.setattr("app.models.adalora.finite", lambda gradients: False)
    told = error_of("fit", "--config", tiny_run, *ADALORA)
    assert "none of the 8 steps before AdaLoRA's last pruning had finite gradients" in told


@pytest.mark.parametrize(("steps", "tinit", "tfinal"), [(2, 0, 0), (3, 1, 1), (4, 2, 1)])
def test_the_shortest_schedules(steps, tinit, tfinal, fit):
    own = "--model.adapter.adalora"
    options = (*ADALORA, f"{own}.tinit={tinit}", f"{own}.tfinal={tfinal}")
    folder = fit(*options, f"--trainer.max_steps={steps}")
    assert values(folder, "adalora/triplets")[-1] == LAYERS * TARGET
    # A step more, which has nothing new to weigh the triplets by, keeps them.
    fit(*options, "--ckpt_path=last", f"--trainer.max_steps={steps + 1}")
    assert values(folder, "adalora/triplets")[steps:] == [LAYERS * TARGET]


OWN = "--model.adapter.adalora"
TOO_SHORT = "lower tinit and tfinal, or train longer"
EPOCH = ("--trainer.max_steps=-1", "--trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_steps=1"], TOO_SHORT),
        ([f"{OWN}.tfinal=2"], TOO_SHORT),
        ([f"{OWN}.tfinal=3"], TOO_SHORT),
        ([f"{OWN}.tinit=2", f"{OWN}.tfinal=1"], TOO_SHORT),
        # An epoch of 40 rows is 5 steps, which is known once there is a loader.
        ([*EPOCH, f"{OWN}.tfinal=4"], "but training has 5 steps"),
        ([f"{OWN}.init_r=9"], "init_r is 9, but model.layers.0.self_attn.k_proj has shape (8, 16)"),
        ([f"{OWN}.init_r=3"], "init_r is 3, below the budget model.adapter.r 4"),
        (["--model.adapter.use_dora=true"], "exclude each other"),
        (
            ["--init=LoraOneInit", "--init.num_samples=16"],
            "init is LoraOneInit, which fills lora_A",
        ),
        ([], "the adapter has adalora, which does not work with the sharded"),
    ],
)
def test_what_cannot_work(options, message, error_of, tiny_run, monkeypatch):
    if message == TOO_SHORT:  # said before any weights are loaded
        monkeypatch.setattr("app.training.model_building.load_model", None)
    if "sharded" in message:
        monkeypatch.setattr("app.training.module.Fsdp2Strategy", SingleDeviceStrategy)
    method = ("--config=methods/adalora.yaml", f"{OWN}.init_r=6")
    assert message in error_of("fit", "--config", tiny_run, *method, *options)
