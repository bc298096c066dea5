"""`plan`: counts and bytes against models that were really loaded, and the command end to end."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, PreTrainedTokenizerFast

from app.commands.plan.command import PlanTrainer, build, plan_trainer
from app.commands.plan.fake_pass import FakeModel, LiveBytes
from app.commands.plan.memory import (
    cache_bytes,
    exact_bytes,
    frozen_bytes,
    gathered_bytes,
    optimizer_bytes,
    sketch_bytes,
    tensor_bytes,
)
from app.commands.plan.placement import Placement, read_placement
from app.distributed.fsdp import Fsdp2Strategy
from app.initialization.gradient_exchange import Layer
from app.initialization.gradient_store import ExactStore
from app.initialization.one_step_gradient import Estimator, make_store
from app.models.adapter_config import LoraSettings
from app.models.lora import lora_pairs
from app.models.loss import summed_loss
from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.training.module import LoraModule

KINDS = ("llama", "t5", "gpt2")
CPU = torch.device("cpu")


def module_of(name, **settings):
    return LoraModule(str(name), **{"adapter": LoraSettings(r=4), **settings})


def loaded(name, **settings):
    module = module_of(name, **settings)
    module.configure_model()
    return module


def planned(name, **settings):
    """Return a module whose model has shapes and no weights, as `plan` builds it."""
    trainer_settings = settings.pop("trainer", {})
    module = module_of(name, **settings)
    build(plan_trainer(trainer_settings, None), module)
    assert all(p.is_meta for p in module.model.parameters())
    return module


def shapes(model):
    return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}


def batch_for(module, rows=4, length=20, answer=2):
    """Return a batch whose rows have different lengths."""
    vocabulary = module.base.config.vocab_size
    ids = torch.randint(4, vocabulary, (rows, length))
    mask = torch.ones_like(ids)
    mask[1:, length - 4 :] = 0
    if module.is_encoder_decoder:
        labels = ids[:, :answer].clone()
    else:
        labels = torch.full_like(ids, -100)
        labels[:, length // 2 : length // 2 + answer] = 5
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class RealLiveBytes(LiveBytes):
    """The same count of a real pass, where a mask has content."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result


def saved_bytes(module, batch):
    """Count what autograd saves in a real forward pass, once each, without parameters."""
    held = [*module.model.parameters(), *module.model.buffers()]
    known = {t.untyped_storage().data_ptr() for t in held}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(module.supervised_logits(batch))
    assert loss.requires_grad
    return sum(seen.values())


def real_peak(module, batch):
    for p in module.model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = RealLiveBytes([*module.model.parameters(), *module.model.buffers(), *batch.values()], 0)
    with live:
        summed_loss(module.supervised_logits(batch)).backward()
    return live.peak


def check_activations(name, rel, **settings):
    real, plan = loaded(name, **settings), planned(name, **settings)
    batch = batch_for(real)
    found = FakeModel(plan.model, plan.base).training(batch)
    assert found.kept == pytest.approx(saved_bytes(real, batch), rel=rel)
    assert found.peak == pytest.approx(real_peak(real, batch), rel=0.01)
    return found


def check_after_a_step(name, optimizer, **settings):
    """Compare weights, adapter and states with what torch holds after one optimizer step."""
    real = loaded(name, optimizer=optimizer, **settings)
    made = real.make_optimizer(real.parameter_groups())
    summed_loss(real.supervised_logits(batch_for(real))).backward()
    made.step()
    states = [s for state in made.state.values() for s in state.values() if torch.is_tensor(s)]
    plan = planned(name, optimizer=optimizer, **settings)
    trained = [p for p in plan.model.parameters() if p.requires_grad]
    assert optimizer_bytes(plan.make_optimizer, plan.parameter_groups()) == tensor_bytes(states)
    whole = frozen_bytes(plan.model, Placement("auto")) + tensor_bytes(trained)
    assert whole == tensor_bytes([*real.model.parameters(), *real.model.buffers()])
    gradients = [p.grad for p in real.model.parameters() if p.grad is not None]
    assert tensor_bytes(trained) == tensor_bytes(gradients)


def check_accumulators(pairs):
    ranks = {pair.name: pair.rank for pair in pairs}
    sketches = make_store(pairs, ranks, Estimator("sketch", oversampling=6), CPU).sketches.values()
    held = [t for s in sketches for t in vars(s).values() if torch.is_tensor(t)]
    assert sketch_bytes(pairs, 6) == tensor_bytes(held)
    sums = make_store(pairs, ranks, Estimator("exact"), CPU).sums.values()
    assert exact_bytes(pairs, 1) == tensor_bytes(s.total for s in sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"adapter": None}, {"dtype": "bfloat16"}], ids=["lora", "full", "bfloat16"]
)
def test_the_planned_model_is_the_loaded_one(kind, settings, run_models):
    plan = planned(run_models / kind, **settings)
    assert shapes(plan.model) == shapes(loaded(run_models / kind, **settings).model)


def test_a_saved_adapter_is_planned_for_too(run_models, tmp_path):
    loaded(run_models / "llama", adapter=LoraSettings(r=2)).model.save_pretrained(tmp_path)
    settings = {"adapter_path": str(tmp_path)}
    plan = planned(run_models / "llama", **settings)
    assert shapes(plan.model) == shapes(loaded(run_models / "llama", **settings).model)


def test_precision_decides_the_types(run_models):
    plan = planned(run_models / "llama", trainer={"precision": "bf16-true"})
    assert {p.dtype for p in plan.model.parameters()} == {torch.bfloat16}
    assert planned(run_models / "llama", trainer={"precision": "16-mixed"}).model is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(kind, checkpointing, run_models):
    # What is alive and not saved, such as the loss, weighs more in a model of 10,000 weights.
    check_activations(run_models / kind, 0.2, gradient_checkpointing=checkpointing)


OPTIMIZERS = {
    "preconditioned": PreconditionedAdamW,
    "lora_plus": LoraPlusAdamW,
    "lora_pro": LoraProAdamW,
    "lora_pro_efficient": partial(LoraProAdamW, mode="efficient"),
    "adamw": lambda params: torch.optim.AdamW(params),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_after_a_step(optimizer, run_models):
    check_after_a_step(run_models / "llama", OPTIMIZERS[optimizer])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_full_fine_tuning(kind, dtype, run_models):
    check_after_a_step(run_models / kind, OPTIMIZERS["adamw"], adapter=None, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulators(kind, run_models):
    check_accumulators(planned(run_models / kind).lora_pairs())


@pytest.mark.smollm2
def test_smollm2_is_what_was_planned(smollm2_dir):
    settings = {"adapter": LoraSettings(r=8)}
    plan = planned(smollm2_dir, **settings)
    assert shapes(plan.model) == shapes(loaded(smollm2_dir, **settings).model)
    check_accumulators(plan.lora_pairs())
    check_after_a_step(smollm2_dir, PreconditionedAdamW, **settings)
    kept = [
        check_activations(smollm2_dir, 0.01, gradient_checkpointing=on, **settings).kept
        for on in (False, True)
    ]
    assert kept[0] > 10 * kept[1]


def test_exact_sums_of_several_processes_are_bounded(monkeypatch, run_models):
    pairs = planned(run_models / "llama").lora_pairs()
    layers = [Layer(p.name, p.lora_B.shape[0], p.lora_A.shape[1]) for p in pairs]
    monkeypatch.setattr("app.initialization.gradient_store.world_size", lambda: 4)
    for process in range(4):
        monkeypatch.setattr(
            "app.initialization.gradient_store.global_rank", lambda process=process: process
        )
        store = ExactStore(layers, CPU)
        bucket = max(sum(m * n for _, m, n in members) for _, members in store.buckets)
        held = tensor_bytes(s.total for s in store.sums.values()) + 4 * bucket
        assert held <= exact_bytes(pairs, 4) < exact_bytes(pairs, 1)


def test_shards_are_those_of_fsdp2(run_models):
    model = planned(run_models / "llama").model
    split = Placement("fsdp", devices=3, sharded=True)
    first = [
        p.chunk(3)[0].numel() * p.element_size() for p in model.parameters() if not p.requires_grad
    ]
    buffers = tensor_bytes(model.buffers())
    assert frozen_bytes(model, split) == sum(first) + buffers
    offloaded = Placement("fsdp", devices=3, sharded=True, cpu_offload=True)
    assert frozen_bytes(model, offloaded) == buffers
    # Two of two blocks, and all that is in none: the whole model.
    everything = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert gathered_bytes(model, split) == 4 * everything
    half = Placement("fsdp", devices=3, sharded=True, gather_dtype=torch.bfloat16)
    assert gathered_bytes(model, half) == 2 * everything
    assert gathered_bytes(model, Placement("ddp", devices=3)) == 0


def test_strategies_are_recognised():
    own = Fsdp2Strategy(param_dtype="bfloat16", cpu_offload=True)
    read = read_placement({"strategy": own, "devices": 8, "num_nodes": 2})
    assert read.sharded
    assert read.world_size == 16
    assert read.gather_dtype == torch.bfloat16
    assert read.cpu_offload
    assert read_placement({"strategy": "fsdp", "devices": "0,1"}).sharded
    ddp = read_placement({"strategy": "ddp_spawn", "devices": [0, 1, 2]})
    assert not ddp.sharded
    assert ddp.world_size == 3
    assert read_placement({"accelerator": "cpu", "devices": "auto"}).world_size == 1


@pytest.fixture
def no_weights(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("app.training.module.load_model", load)


@pytest.fixture
def plan(command, tiny_run, capsys, no_weights, tmp_path):
    """Return `plan(*argv, status=0)`: what the command prints; no run folder may appear."""

    def run(*argv, status=0):
        capsys.readouterr()
        assert command("plan", "--config", tiny_run, *argv) == status
        assert not (tmp_path / "runs").exists()
        printed = capsys.readouterr()
        return printed.err if status == 2 else printed.out

    return run


def test_the_command(plan):
    told = plan()
    assert "train rows                                  40" in told
    assert "8 x 1 processes x 1 accumulated" in told
    assert "optimizer steps                              3   5 an epoch" in told
    assert "result:>>> positive<eos><<<" in told
    assert told.count("tokens read, 2 supervised") == 3
    assert "rank 4 in 14 layers" in told
    assert "initialization (sketch)" in told
    assert "\nfits: " in told
    assert "memory of each process (one process)" in told


def test_the_command_on_t5_without_initialization(plan, run_models):
    told = plan("--model.name", run_models / "t5", "--config", "methods/lora.yaml")
    assert ">>>positive<eos><<<" in told or ">>> positive<eos><<<" in told
    assert "initialization" not in told


CODE = "```python\ndef f(x):\n    return x\n```"
ROWS = {
    "Gsm8kDataModule": {"question": "What is {i} + 1?", "answer": "One more.\n#### {i}"},
    "MetaMathQADataModule": {"query": "What is {i}?", "response": "It is {i}.", "type": "GSM_SV"},
    "CodeFeedbackDataModule": {"query": "Write f{i}.", "answer": CODE},
    "InstructionDataModule": {"instruction": "Add {i}.", "input": "", "output": "one more"},
    "CommonsenseDataModule": {
        "instruction": "Is {i} true? Answer format: true/false",
        "input": "",
        "output": "the correct answer is true",
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_the_tokenizer_chooses(name, plan, tmp_path):
    """Sources of free answers keep rows by their tokens, so that their rows need the tokenizer."""
    rows = [{k: v.replace("{i}", str(i)) for k, v in ROWS[name].items()} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sizes = {"max_length": 512, "batch_size": 4, "validation_size": 4}
    arguments = {"path": str(tmp_path / "rows.json"), **sizes}
    data = {"data": {"class_path": name, "init_args": arguments}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    printed = plan("--config", tmp_path / "data.yaml")
    assert "train rows                                  16" in printed
    assert "validation rows                              4" in printed
    assert printed.count("tokens read, ") == 3
    assert "initialization (sketch)" in printed
    assert "\nfits: " in printed


def test_rows_of_movie_reviews(plan, tmp_path):
    lines = [f"{i}\t{i % 2 * 2 - 1}\tSentence {i}." for i in range(28)]
    (tmp_path / "ratings.txt").write_text("\r\n".join(lines))
    arguments = {"path": str(tmp_path / "ratings.txt"), "validation_size": 3, "test_size": 5}
    data = {"class_path": "MovieReviewsDataModule", "init_args": arguments}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    assert "train rows                                  20" in plan(
        "--config", tmp_path / "data.yaml"
    )


def test_questions_alone_are_no_training_data(plan, tmp_path):
    (tmp_path / "data.yaml").write_text("data: {class_path: BenchmarkDataModule}")
    assert "has no rows to train on" in plan("--config", tmp_path / "data.yaml", status=2)


def test_a_cluster_from_a_laptop(plan):
    options = ("--trainer.accelerator=gpu", "--trainer.devices=4", "--trainer.num_nodes=2")
    told = plan(*options, "--config=strategies/fsdp.yaml", "--memory_gib=1")
    assert "memory of each process (Fsdp2Strategy, 8 processes)" in told
    assert "8 x 8 processes x 1 accumulated" in told
    assert "of 1.0 GiB (--memory_gib)" in told
    told = plan(*options, "--config=strategies/fsdp.yaml", "--memory_gib=1e-4", status=1)
    assert "does not fit: " in told
    assert "lower data.batch_size" in told


def test_cut_prompts_and_accumulation_are_told(plan):
    told = plan("--data.max_length=100", "--trainer.accumulate_grad_batches=2")
    assert "0 prompts cut to data.max_length=100" in told
    assert "rows an optimizer step                      16" in told
    with pytest.warns(UserWarning, match="were cut"):
        assert "40 prompts cut to data.max_length=50" in plan("--data.max_length=50")


def test_weights_need_not_be_there(plan, run_models, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_models / "llama", bare)
    (bare / "model.safetensors").unlink()
    assert "\nfits: " in plan("--model.name", bare)
    (bare / "tokenizer.json").unlink()
    assert "lacks: a tokenizer" in plan("--model.name", bare, status=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--model.adapter.r=17",), "set model.adapter.r to at most 16"),
        (("--model.adapter.target_modules=[quary]",), "which fits no layer of this model"),
        (("--data.bath_size=2",), "did you mean data.batch_size?"),
        (("--data.path=nowhere",), "nowhere"),
        (("--init.num_samples=1000",), "expected 1 to 40"),
        (("--memory_gib=0",), "--memory_gib is 0.0: expected more than 0"),
        (("--trainer.accelerator=tpu",), "say so with --memory_gib"),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=-1"), "has no end: set one of them"),
        (("--trainer.precision=7",), "trainer"),
        (
            ("--config=methods/full.yaml", "--config=strategies/fsdp.yaml"),
            "shards frozen weights only",
        ),
        (("--model.adapter=null", "--init=null"), "PreconditionedAdamW, which works on LoRA pairs"),
        (("--model.adapter=null",), "the model has no LoRA adapter"),
    ],
)
def test_errors_are_one_line(options, told, plan):
    printed = plan(*options, status=2)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in printed


def test_unknown_config(command, capsys):
    assert command("plan", "--config", "quickstrat.yaml") == 2
    assert "did you mean quickstart.yaml?" in capsys.readouterr().err


def test_print_config_and_help(command, tiny_run, capsys):
    for options, told in (
        ("--print_config", "memory_gib: null"),
        ("--help", "Memory of one device"),
    ):
        with pytest.raises(SystemExit) as end:
            command("plan", "--config", tiny_run, options)
        assert end.value.code == 0
        assert told in capsys.readouterr().out


def test_seventy_billion_parameters(plan, run_models, tmp_path):
    big = tmp_path / "big"
    big.mkdir()
    PreTrainedTokenizerFast.from_pretrained(run_models / "llama").save_pretrained(big)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ).save_pretrained(big)
    assert "dtype" not in json.loads((big / "config.json").read_text())
    options = ("--model.name", big, "--model.dtype=bfloat16", "--model.adapter.r=8")
    told = plan(
        *options,
        *("--model.gradient_checkpointing=true", "--config=strategies/fsdp.yaml"),
        *("--trainer.accelerator=gpu", "--trainer.devices=8", "--memory_gib=80"),
        "--config=methods/lora.yaml",  # the pass of the initialization takes ten seconds more
    )
    assert "68,976,648,192   bfloat16" in told
    assert "frozen weights                        16.1 GiB   1/8 of them" in told
    assert "host memory while loading            128.5 GiB   in the first process" in told
    assert "trained parameters                 103,546,880" in told
    assert "\nfits: " in told


def test_the_trainer_is_lightnings(run_models):
    trainer = plan_trainer({"max_steps": 3, "devices": 64, "strategy": "ddp"}, None)
    assert isinstance(trainer, PlanTrainer)
    assert trainer.world_size == 1
    assert trainer.placement.world_size == 64
    assert not lora_pairs(planned(run_models / "llama", adapter=None).model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_keys_and_values_are_as_large_as_those_of_a_model(kind, run_models):
    module = loaded(run_models / kind)
    prompts = torch.randint(4, 100, (3, 29))
    with torch.no_grad():
        cache = module.model(prompts, use_cache=True).past_key_values
    kept = tensor_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(module.base.config, rows=3, tokens=29, itemsize=4) == kept


def test_keys_and_values_of_an_encoder_decoder(run_models):
    """Its own and those of the prompt, each with 29 positions."""
    module = loaded(run_models / "t5")
    tokens = torch.randint(4, 100, (3, 29))
    with torch.no_grad():
        cache = module.model(tokens, decoder_input_ids=tokens, use_cache=True).past_key_values
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    kept = tensor_bytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(module.base.config, rows=3, tokens=58, itemsize=4) == kept
