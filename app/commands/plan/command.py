"""`python train.py plan`: what a run will learn from and what it takes, before any weights are loaded."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from app.commands.plan.fake_pass import DryModel
from app.commands.plan.memory import (
    Placement,
    RunMemory,
    cache_bytes,
    exact_bytes,
    exchange_bytes,
    frozen_bytes,
    gathered_bytes,
    optimizer_bytes,
    sketch_bytes,
    tensor_bytes,
)
from app.commands.plan.report import data_text, memory_text, model_text, verdict_text
from app.models.adapter_io import load_adapter
from app.models.loading import ModelSource, empty_model
from app.models.lora import add_lora, base_model
from app.models.source import TOKENIZER_FILES
from app.training.module import LoraModule
from app.utils.errors import InputError

GIB = 2**30


class PlanTrainer(Trainer):
    """Lightning's trainer, which can also say what a run takes.

    For `plan` it is made for one process on the CPU, whatever the run asks for, so that a laptop can plan
    for a cluster; what the run asks for is in `placement`.
    """

    placement: Placement
    accelerator_name: str
    init: Any = None
    fits = True

    def plan(
        self,
        model: Any,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        memory_gib: float | None = None,
    ) -> None:
        """Check config, data and model, show examples and say whether the run fits into memory.

        Nothing is trained, written or loaded but the configuration, the tokenizer and the data. The exit
        status is 0 if the run fits and 1 if it does not.

        Args:
            model: The LightningModule.
            datamodule: The data.
            ckpt_path: As for `fit`; not read.
            weights_only: As for `fit`; not used.
            memory_gib: Memory of one device in GiB, such as 80, to plan for another machine; null takes
                this machine's.
        """
        memory = device_memory(self.accelerator_name, self.placement.devices, memory_gib)
        check(self, model, datamodule)
        print(data_text(self, model, datamodule, self.placement), end="\n\n")
        built = build(self, model)
        print(model_text(model, built), end="\n\n")
        needed = run_memory(self, model, datamodule, built)
        print(memory_text(needed, self.placement), end="\n\n")
        self.fits = needed.peak <= memory
        print(verdict_text(needed.peak, memory, given=memory_gib is not None), flush=True)


def plan_trainer(settings: Mapping[str, Any], init: Any) -> PlanTrainer:
    """Make a trainer without what needs the run's machine or leaves something behind.

    Args:
        settings: The run's trainer, as Lightning's `Trainer` takes it.
        init: LoRA-One's start; None without.
    """
    precision = settings.get("precision")
    here = {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        # The CPU's autocast knows bfloat16 only; both have 16 bits.
        "precision": "bf16-mixed" if precision in ("16-mixed", 16, "16") else precision,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    logging.disable()  # what Lightning says of devices would be about this trainer, not the run's
    try:
        with warnings.catch_warnings(action="ignore"):
            trainer = PlanTrainer(**{**settings, **here})
    finally:
        logging.disable(logging.NOTSET)
    trainer.placement, trainer.init = read_placement(settings), init
    trainer.accelerator_name = str(settings.get("accelerator", "auto"))
    return trainer


def read_placement(settings: Mapping[str, Any]) -> Placement:
    """Read off a trainer's settings where a run puts its weights.

    Args:
        settings: `strategy` (a name or an object), `devices`, `num_nodes` and `accelerator`.

    Returns:
        The placement; "auto" devices are those of this machine, 1 on the CPU.
    """
    strategy = settings.get("strategy") or "auto"
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    sharded = "fsdp" in name.lower() or isinstance(strategy, ModelParallelStrategy)
    devices = _count(settings.get("devices", "auto"), str(settings.get("accelerator")))
    num_nodes = int(settings.get("num_nodes", 1))
    dtype = getattr(strategy, "param_dtype", None)
    if name == "auto":
        name = "ddp" if devices * num_nodes > 1 else "one process"
    return Placement(
        strategy=name,
        devices=devices,
        num_nodes=num_nodes,
        sharded=sharded,
        gather_dtype=None if dtype is None else getattr(torch, dtype),
        cpu_offload=bool(getattr(strategy, "cpu_offload", False)),
        reshard_after_forward=bool(getattr(strategy, "reshard_after_forward", True)),
    )


def _count(devices: Any, accelerator: str) -> int:
    """Count devices as the trainer does: "auto", -1, a number, "2", "0,1" or [0, 1]."""
    if str(devices) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if accelerator != "cpu" else 1
    if isinstance(devices, str) and "," in devices:
        return len([number for number in devices.split(",") if number.strip()])
    return len(devices) if isinstance(devices, list) else int(devices)


def device_memory(accelerator: str, processes: int, memory_gib: float | None) -> int:
    """Return the bytes that one process may use.

    Args:
        accelerator: The trainer's: "auto" takes a GPU where this machine has one.
        processes: Processes that share this machine's main memory, if the run is on the CPU.
        memory_gib: What the user says instead, for one device.

    Raises:
        InputError: A size that is not positive, or a GPU asked for that this machine does not have.
    """
    if memory_gib is not None:
        if not memory_gib > 0:
            raise InputError(f"--memory_gib is {memory_gib}: expected more than 0, such as 80")
        return round(memory_gib * GIB)
    if accelerator != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    if accelerator not in ("cpu", "auto"):
        raise InputError(
            f"trainer.accelerator is {accelerator!r}, but this machine has none to ask how much memory "
            "it has: say so with --memory_gib, such as --memory_gib 80"
        )
    return psutil.virtual_memory().available // processes


def check(trainer: PlanTrainer, module: LoraModule, data: Any) -> None:
    """Do what `fit` does before it loads weights, so that the same wrong input stops here.

    Raises:
        InputError: As from `fit`.
    """
    data.prepare_data()
    data.rows("train")  # before the tokenizer, which may be a long download away
    module._source = _without_weights(module.name)
    data.attach(module.tokenizer, module.is_encoder_decoder)
    data.setup("fit")
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    if trainer.init is not None:
        trainer.init.setup(trainer, module, "fit")
    module.setup("fit")
    if trainer.placement.sharded and module.adapter is None and module.adapter_path is None:
        raise InputError(
            "model.adapter is null, but this strategy shards frozen weights only: set model.adapter, or "
            "train every weight with --config strategies/ddp.yaml"
        )


def _without_weights(name: str) -> ModelSource | None:
    """Return a directory that has all but its weights; None for a name that `fit` can load too."""
    folder = Path(name).expanduser()
    has = [(folder / file).is_file() for file in TOKENIZER_FILES]
    if not (folder / "config.json").is_file() or not any(has) or any(folder.glob("*.safetensors")):
        return None
    arguments = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    return ModelSource("directory", name, arguments)


def build(trainer: PlanTrainer, module: LoraModule) -> nn.Module:
    """Build the model with its adapter on the meta device: shapes and types, no numbers.

    Args:
        trainer: Its precision decides types, too.
        module: Settings of the model and the adapter; `module.model` is set.

    Returns:
        The model as `fit` would train it.

    Raises:
        InputError: No such architecture, or an adapter that does not fit.
    """
    dtype = getattr(torch, module.dtype_name)
    base = empty_model(module.source, dtype, module.attn_implementation)
    with torch.device("meta"):
        if module.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model: nn.Module = base
        if module.adapter_path is not None:
            model = load_adapter(base, Path(module.adapter_path), trainable=True)
        elif module.adapter is not None:
            model = add_lora(base, module.adapter)
        else:
            base.requires_grad_(True)
    if module.gradient_checkpointing:
        base.enable_input_require_grads()
    module.model = trainer.precision_plugin.convert_module(model)
    return module.model


def run_memory(trainer: PlanTrainer, module: LoraModule, data: Any, model: nn.Module) -> RunMemory:
    """Add up and measure what a run takes on each process.

    Args:
        trainer: Its placement, precision and initialisation.
        module: The optimizer.
        data: The longest training, validation and initialisation rows make the batches.
        model: From `build`; its passes are measured, after which it is of no use.
    """
    placement, init = trainer.placement, trainer.init
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = tensor_bytes(trained)
    frozen, gathered = frozen_bytes(model, placement), gathered_bytes(model, placement)
    loading = frozen_bytes(model, replace(placement, sharded=False))
    gathered_as = placement.gather_dtype if placement.sharded else None
    context = trainer.precision_plugin.forward_context
    dry = DryModel(model, base_model(model), context, gathered_as)
    # The longest rows come first in all batches, and in the first process's share.
    train, validation = (next(iter(x)) for x in (data.train_dataloader(), data.val_dataloader()[0]))
    needed = RunMemory(
        frozen=frozen,
        loading=loading,
        gathered=gathered,
        trained=gradients,
        gradients=gradients,
        exchange=exchange_bytes(gradients, placement),
        optimizer=optimizer_bytes(module.make_optimizer, module.parameter_groups()),
        training=dry.training(train),
        evaluation=dry.evaluation(validation),
        generation=generation_bytes(module, data),
    )
    if init is None or not hasattr(init, "estimator"):  # none, or one that observes no gradient
        return needed
    pairs, world = module.lora_pairs(), placement.world_size
    batches = data.gradient_batches(init.num_samples, init.micro_batch_size, 0, world)
    return replace(
        needed,
        observation=dry.observation(batches[0], pairs),
        sketch=sketch_bytes(pairs, init.estimator.oversampling),
        exact=exact_bytes(pairs, world),
        estimator=init.estimator.kind,
    )


def generation_bytes(module: LoraModule, data: Any) -> int:
    """Return the keys and values of the largest batch of benchmark questions in validation."""
    largest = 0
    for prepared in data.prepare_benchmarks("validation"):
        decoding = prepared.benchmark.decoding
        samples, new = (
            (1, 1) if decoding is None else (decoding.num_samples, decoding.max_new_tokens)
        )
        rows = min(data.eval_batch_size, len(prepared.questions)) * samples
        tokens = max(map(len, prepared.questions)) + new
        itemsize = getattr(torch, module.dtype_name).itemsize
        largest = max(largest, cache_bytes(module.base.config, rows, tokens, itemsize))
    return largest
