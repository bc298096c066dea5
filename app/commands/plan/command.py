"""`python train.py plan`: what a run will learn from and what it takes, before any weights are loaded."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from app.commands.plan import memory
from app.commands.plan.fake_pass import FakeModel
from app.commands.plan.placement import Placement, device_memory, read_placement
from app.commands.plan.protocols import PlannedData, TrainingRows
from app.commands.plan.report import data_text, memory_text, model_text, verdict_text
from app.models.batch import Batch
from app.models.lora import base_model, fsdp_incompatible_settings
from app.models.source import resolve_model
from app.training.checks import check_sharding
from app.training.module import LoraModule
from app.training.optimization import parameter_groups
from app.training.protocols import GradientInitialization


class PlanTrainer(Trainer):
    """Lightning's trainer with one more method, `plan`.

    For `plan` it is made for one process on the CPU, whatever the run asks for, so that a laptop can plan
    for a cluster; what the run asks for is in `placement`.
    """

    placement: Placement
    accelerator_name: str
    init: Callback | None = None
    fits = True

    def plan(
        self,
        model: LoraModule,
        datamodule: PlannedData,
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
        available = device_memory(self.accelerator_name, self.placement.devices, memory_gib)
        set_up(self, model, datamodule)
        print(data_text(self, model, datamodule, self.placement), end="\n\n")
        built = build(self, model)
        print(model_text(model, built), end="\n\n")
        needed = run_memory(self, model, datamodule, built)
        print(memory_text(needed, self.placement), end="\n\n")
        self.fits = needed.peak <= available
        print(verdict_text(needed.peak, available, given=memory_gib is not None), flush=True)


def plan_trainer(settings: Mapping[str, Any], init: Callback | None) -> PlanTrainer:
    """Make a run's trainer without what needs the run's machine or leaves something behind."""
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


def set_up(trainer: PlanTrainer, module: LoraModule, data: PlannedData) -> None:
    """Set up data, initialization and module in the order of `fit`, so that the same wrong input stops here."""
    if Path(module.name).expanduser().is_dir():  # another source is resolved after the data is read
        found = resolve_model(module.name, weights=False)
        module.source = replace(found, quantization=module.quantization)
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    data.prepare_data()
    data.setup("fit")
    if trainer.init is not None:
        trainer.init.setup(trainer, module, "fit")
    module.setup("fit")
    if trainer.placement.sharded:
        module.check_sharded()


def build(trainer: PlanTrainer, module: LoraModule) -> nn.Module:
    """Build the model as `fit` would train it, on the meta device, and set `module.model`.

    It has shapes and types, which the trainer's precision decides too, and no numbers.

    Raises:
        InputError: No such architecture, or an adapter that does not fit.
    """
    model = module.blueprint
    if trainer.placement.sharded:
        check_sharding(fsdp_incompatible_settings(model))
    module.model = trainer.precision_plugin.convert_module(model)
    return module.model


def run_memory(
    trainer: PlanTrainer, module: LoraModule, data: PlannedData, model: nn.Module
) -> memory.RunMemory:
    """Add up and measure what a run takes on each process.

    Args:
        trainer: Its placement, precision and initialization.
        module: The optimizer.
        data: The longest training, validation and initialization rows make the batches.
        model: From `build`; its passes are measured, after which it is of no use.
    """
    placement = trainer.placement
    trained = memory.tensor_bytes(p for p in model.parameters() if p.requires_grad)
    frozen = memory.frozen_bytes(model, placement)
    gathered = memory.gathered_bytes(model, placement)
    loading = memory.frozen_bytes(model, replace(placement, sharded=False))
    gathered_as = placement.gather_dtype if placement.sharded else None
    context = trainer.precision_plugin.forward_context
    fake = FakeModel(model, base_model(model), context, gathered_as)
    # The longest rows come first in all batches that are grouped by length, and in the first process's share.
    training = fake.training(longest_batch(data.train_dataloader(), data.length_grouping))
    validation = 0
    if data.encoded("validation"):
        validation = fake.evaluation(next(iter(data.val_dataloader()[0]))).peak
    initialization = None
    if hasattr(trainer.init, "estimator"):
        init = cast(GradientInitialization, trainer.init)
        pairs, world = module.lora_pairs(), placement.world_size
        batches = data.gradient_batches(
            init.num_samples, init.micro_batch_size, 0, world, init.drawn
        )
        initialization = memory.InitializationMemory(
            activations=fake.observation(batches[0], pairs, init.train_mode).peak,
            sketch=memory.sketch_bytes(pairs, init.estimator.oversampling),
            exact=memory.exact_bytes(pairs, world),
            estimator="sketch" if init.estimator.kind == "sketch" else "exact",
        )
    groups = parameter_groups(model)
    return memory.RunMemory(
        frozen=frozen,
        loading=loading,
        gathered=gathered,
        trained=trained,
        exchange=trained if placement.world_size > 1 else 0,
        optimizer=memory.optimizer_bytes(module.make_optimizer, groups),
        training=training,
        validation=validation,
        generation=generation_bytes(module, data),
        initialization=initialization,
    )


def longest_batch(loader: DataLoader[Any], length_grouping: bool) -> Batch:
    """Return the training batch that takes most: the first one, or the longest rows where any may meet."""
    if length_grouping:
        return cast(Batch, next(iter(loader)))
    rows = cast(TrainingRows, loader.dataset)
    numbers = sorted(range(len(rows.lengths)), key=lambda number: -rows.lengths[number])
    return cast(Batch, loader.collate_fn([rows[i] for i in numbers[: loader.batch_size]]))


def generation_bytes(module: LoraModule, data: PlannedData) -> int:
    """Return the bytes of keys and values of the largest batch of benchmark questions in validation."""
    largest = 0
    itemsize = getattr(torch, module.dtype_name).itemsize
    for prepared in data.prepare_benchmarks("validation"):
        decoding = prepared.benchmark.decoding
        samples = decoding.num_samples if decoding else 1
        rows = min(data.eval_batch_size, len(prepared.questions)) * samples
        tokens = max(map(len, prepared.questions)) + (decoding.max_new_tokens if decoding else 1)
        largest = max(largest, memory.cache_bytes(module.base.config, rows, tokens, itemsize))
    return largest
