"""End a fit before its first step, and write the adapter as it was initialized."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError

from app.models.adapter_io import save_adapter
from app.models.loading import base_reference
from app.models.lora import is_adapted
from app.tracking.model_card import ADAPTER_CONFIG, write_card
from app.tracking.model_usage import quantization_code
from app.tracking.record import DataRecord
from app.training.protocols import adapted, data_of
from app.utils.errors import InputError, reason
from app.utils.files import atomic_folder, read_json


class WriteInit(Callback):
    """Write the adapter instead of training it; listed after the initialization.

    Args:
        folder: Where to; made here.
        seed: The run's seed, for the model card.
        config: The resolved configuration of `fit`, for the model card.
    """

    def __init__(self, folder: Path, seed: int, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.seed = seed
        self.config = config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop: Lightning trains nothing if asked to here, unless the trainer has a least length."""
        trainer.should_stop = True

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter with its tokenizer and model card; print how to load it."""
        module = adapted(pl_module)
        module.record.seed = self.seed
        module.record.data = DataRecord(**data_of(trainer).describe())
        assert is_adapted(module.model)  # app.training.checks.check_init_alone
        base, revision = base_reference(module.source)
        try:
            with atomic_folder(self.folder) as part:
                save_adapter(module.model, part, base, revision=revision)
                module.tokenizer.save_pretrained(str(part))
                adapter = read_json(part / ADAPTER_CONFIG) or {}
                write_card(part, module.record, self.config, adapter)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the initialized adapter could not be written to --output {str(self.folder)!r} "
                f"({reason(error)}): make room, or name another folder"
            ) from error
        auto, trainer_code = (
            "AutoModelForCausalLM",
            "trl.SFTTrainer(model, train_dataset=...).train()",
        )
        if module.config.is_encoder_decoder:
            auto, trainer_code = (
                "AutoModelForSeq2SeqLM",
                "transformers.Seq2SeqTrainer(model, ...).train()",
            )
        at = f", revision={revision!r}" if revision else ""
        at += f", dtype={module.dtype_name!r}"
        at += quantization_code(module.source.quantization, module.dtype_name)
        print(
            f"\nwrote {self.folder}: {module.record.method}, initialized and not trained; rank {adapter['r']}, "
            f"scaling {adapter['lora_alpha'] / adapter['r']:.6g} (lora_alpha / r). To train it elsewhere:\n"
            f"  base = {auto}.from_pretrained({base!r}{at})\n"
            f"  model = PeftModel.from_pretrained(base, {str(self.folder)!r}, is_trainable=True)\n"
            f"  {trainer_code}  # no peft_config: it would make a new adapter",
            flush=True,
        )
