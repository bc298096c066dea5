"""Counts and bytes of a planned model against one that was really loaded."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only
from transformers import LlavaConfig

from app.commands.plan.command import build, plan_trainer
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
from app.models.loss import summed_loss, supervised_loss
from app.models.quantization import scales
from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.lora_sb import LoraSbAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.optim.reflora import RefLoraAdamW
from app.training.module import LoraModule
from app.training.optimization import parameter_groups
from app.utils.errors import InputError
from tests.support.configured import configured
from tests.support.mixtures import save_mixture

KINDS = ("llama", "t5", "gpt2")
CPU = torch.device("cpu")


def loaded(name, **settings):
    return configured(LoraModule(str(name), **{"adapter": LoraSettings(r=4), **settings}))


def planned(name, trainer=None, **settings):
    """Return a module whose model has shapes and no weights, as `plan` builds it."""
    module = LoraModule(str(name), **{"adapter": LoraSettings(r=4), **settings})
    build(plan_trainer(trainer or {}, None), module)
    assert all(p.is_meta for p in module.model.parameters())
    return module


def shapes(model):
    return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}


def batch_for(module, rows=4, length=20, answer=2):
    """Return a batch whose rows have different lengths."""
    ids = torch.randint(4, module.base.config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    mask[1:, length - 4 :] = 0
    labels = torch.full_like(ids, -100)
    labels[:, length // 2 : length // 2 + answer] = 5
    if module.is_encoder_decoder:
        labels = ids[:, :answer].clone()
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
        loss, _ = supervised_loss(module.model, module.base, batch)
    assert loss.requires_grad
    return sum(seen.values())


def real_peak(module, batch):
    for p in module.model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    held = [*module.model.parameters(), *module.model.buffers(), *batch.values()]
    with RealLiveBytes(held, 0) as live:
        supervised_loss(module.model, module.base, batch)[0].backward()
    return live.peak


def check_activations(name, rel, **settings):
    real, plan = loaded(name, **settings), planned(name, **settings)
    batch = batch_for(real)
    measured = FakeModel(plan.model, plan.base).training(batch)
    assert measured.kept == pytest.approx(saved_bytes(real, batch), rel=rel)
    assert measured.peak == pytest.approx(real_peak(real, batch), rel=0.01)
    return measured


def check_after_a_step(name, optimizer, **settings):
    """Compare weights, adapter and states with what torch holds after one optimizer step."""
    real = loaded(name, optimizer=optimizer, **settings)
    made = real.make_optimizer(parameter_groups(real.model))
    summed_loss(real.supervised_logits(batch_for(real))).backward()
    made.step()
    states = [s for state in made.state.values() for s in state.values() if torch.is_tensor(s)]
    plan = planned(name, optimizer=optimizer, **settings)
    trained = [p for p in plan.model.parameters() if p.requires_grad]
    groups = parameter_groups(plan.model)
    assert optimizer_bytes(plan.make_optimizer, groups) == tensor_bytes(states)
    whole = frozen_bytes(plan.model, Placement("auto")) + tensor_bytes(trained)
    assert whole == tensor_bytes([*real.model.parameters(), *real.model.buffers()])
    gradients = [p.grad for p in real.model.parameters() if p.grad is not None]
    assert tensor_bytes(trained) == tensor_bytes(gradients)


def check_accumulators(pairs):
    ranks = {pair.name: pair.rank for pair in pairs}
    sketches = make_store(pairs, ranks, Estimator("sketch", oversampling=6), CPU).sketches.values()
    for sketch in sketches:
        sketch.update(torch.ones(1, len(sketch.right)), torch.ones(1, len(sketch.left)))
    tensors = [t for s in sketches for t in vars(s).values() if torch.is_tensor(t)]
    held = {t.data_ptr(): t for t in tensors}  # several sketches have some of them
    assert sketch_bytes(pairs, 6) == tensor_bytes(held.values())
    sums = make_store(pairs, ranks, Estimator("exact"), CPU).sums.values()
    assert exact_bytes(pairs, 1) == tensor_bytes(s.total for s in sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter": None}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}],
    ids=["lora", "full", "bfloat16", "checkpointing"],
)
def test_the_planned_model_is_the_loaded_one(kind, settings, run_models):
    plan = planned(run_models / kind, **settings)
    assert shapes(plan.model) == shapes(loaded(run_models / kind, **settings).model)
    assert bool(plan.lora_pairs()) is ("adapter" not in settings)


def test_a_saved_adapter_is_planned_for_too(run_models, tmp_path):
    loaded(run_models / "llama", adapter=LoraSettings(r=2)).model.save_pretrained(tmp_path)
    settings = {"adapter_path": str(tmp_path)}
    plan = planned(run_models / "llama", **settings)
    assert shapes(plan.model) == shapes(loaded(run_models / "llama", **settings).model)


def test_precision_decides_the_types(run_models):
    plan = planned(run_models / "llama", {"precision": "bf16-true"})
    assert {p.dtype for p in plan.model.parameters()} == {torch.bfloat16}
    assert planned(run_models / "llama", {"precision": "16-mixed"}).model is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(kind, checkpointing, run_models):
    # What is alive and not saved, such as random states, weighs more in a model of 10,000 weights.
    check_activations(run_models / kind, 0.25, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize(
    "optimizer",
    [
        PreconditionedAdamW,
        LoraPlusAdamW,
        LoraProAdamW,
        partial(LoraProAdamW, mode="efficient"),
        RefLoraAdamW,
        LoraSbAdamW,
        torch.optim.AdamW,
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ],
    ids=lambda kind: getattr(kind, "__name__", str(getattr(kind, "keywords", ""))),
)
def test_bytes_after_a_step(optimizer, run_models):
    check_after_a_step(run_models / "llama", optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_full_fine_tuning_and_of_accumulators(kind, run_models):
    for dtype in ("float32", "bfloat16"):
        check_after_a_step(run_models / kind, torch.optim.AdamW, adapter=None, dtype=dtype)
    check_accumulators(planned(run_models / kind).lora_pairs())


def test_fused_experts_are_planned_for(run_models, tmp_path):
    """Factors, states and passes; the gradient of a layer's experts is whole in that of the initialization."""
    save_mixture("mixtral", tmp_path, run_models / "llama")
    for optimizer in (PreconditionedAdamW, LoraProAdamW, LoraSbAdamW):
        check_after_a_step(tmp_path, optimizer)
    check_activations(tmp_path, 0.2)
    plan = planned(tmp_path)
    check_accumulators(plan.lora_pairs())
    batch = batch_for(plan)
    forward = FakeModel(plan.model, plan.base).observation(batch, [])
    plan = planned(tmp_path)
    observed = FakeModel(plan.model, plan.base).observation(batch, plan.lora_pairs())
    assert observed.peak >= forward.peak + 4 * 48 * 16 * 4  # of gate_up_proj, float32


def test_a_model_that_looks_at_its_numbers_is_refused(run_models, tmp_path):
    """Switch Transformers ask which experts have tokens before they run them."""
    plan = planned(save_mixture("switch", tmp_path, run_models / "llama"))
    with pytest.raises(InputError, match="plan cannot measure this model") as error:
        FakeModel(plan.model, plan.base).training(batch_for(plan))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "dora"), [("llama", True), ("t5", False), ("gpt2", False)])
def test_most_bytes_on_four_bits(kind, dora, wide_models):
    """DoRA reads the values of the codes."""
    settings = {"adapter": LoraSettings(r=4, use_dora=dora), "quantization": "nf4"}
    real, plan = (make(wide_models / kind, **settings) for make in (loaded, planned))
    frozen = [p for p in real.model.parameters() if not p.requires_grad]
    held = tensor_bytes([*frozen, *real.model.buffers(), *scales(real.model)])
    assert frozen_bytes(plan.model, Placement("auto")) == held
    batch = batch_for(real)
    measured = FakeModel(plan.model, plan.base).training(batch)
    assert measured.peak == pytest.approx(real_peak(real, batch), rel=0.01)


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
    store_module = "app.initialization.gradient_store"
    monkeypatch.setattr(f"{store_module}.world_size", lambda: 4)
    for process in range(4):
        monkeypatch.setattr(f"{store_module}.global_rank", lambda process=process: process)
        store = ExactStore(layers, CPU)
        bucket = max(sum(m * n for _, m, n in members) for _, members in store.buckets)
        held = tensor_bytes(s.total for s in store.sums.values()) + 4 * bucket
        assert held <= exact_bytes(pairs, 4) < exact_bytes(pairs, 1)


def test_shards_are_those_of_fsdp2(run_models):
    model = planned(run_models / "llama").model
    split = Placement("fsdp", devices=3, sharded=True)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    first = sum(p.chunk(3)[0].numel() * p.element_size() for p in frozen)
    buffers = tensor_bytes(model.buffers())
    assert frozen_bytes(model, split) == first + buffers
    offloaded = Placement("fsdp", devices=3, sharded=True, cpu_offload=True)
    assert frozen_bytes(model, offloaded) == buffers
    # Two of two blocks, and all that is in none: the whole model.
    everything = sum(p.numel() for p in frozen)
    assert gathered_bytes(model, split) == 4 * everything
    half = Placement("fsdp", devices=3, sharded=True, gather_dtype=torch.bfloat16)
    assert gathered_bytes(model, half) == 2 * everything
    assert gathered_bytes(model, Placement("ddp", devices=3)) == 0


def test_strategies_are_recognised():
    own = Fsdp2Strategy(param_dtype="bfloat16", cpu_offload=True)
    read = read_placement({"strategy": own, "devices": 8, "num_nodes": 2})
    assert (read.sharded, read.cpu_offload, read.world_size) == (True, True, 16)
    assert read.gather_dtype == torch.bfloat16
    assert read_placement({"strategy": "fsdp", "devices": "0,1"}).sharded
    ddp = read_placement({"strategy": "ddp_spawn", "devices": [0, 1, 2]})
    assert (ddp.sharded, ddp.world_size) == (False, 3)
    assert read_placement({"accelerator": "cpu", "devices": "auto"}).world_size == 1
    trainer = plan_trainer({"max_steps": 3, "devices": 64, "strategy": "ddp"}, None)
    assert (trainer.world_size, trainer.placement.world_size) == (1, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_as_large_as_those_of_a_model(kind, run_models):
    module = loaded(run_models / kind)
    prompts = torch.randint(4, 100, (3, 29))
    decoder = {"decoder_input_ids": prompts} if kind == "t5" else {}
    with torch.no_grad():
        cache = module.model(prompts, **decoder, use_cache=True).past_key_values
    layers = cache.layers if kind != "t5" else []
    if kind == "t5":  # its own and those of the prompt, each with 29 positions
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    kept = tensor_bytes(tensor for layer in layers for tensor in (layer.keys, layer.values))
    tokens = 58 if kind == "t5" else 29
    assert cache_bytes(module.base.config, rows=3, tokens=tokens, itemsize=4) == kept
    if kind == "llama":  # of a model that reads images, too
        config = LlavaConfig(text_config=module.base.config)
        assert cache_bytes(config, rows=3, tokens=tokens, itemsize=4) == kept
