"""Write what a run would have left, had it ended with one of its checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from app.models.adalora import load_allocator_state
from app.models.adapter_config import LoraSettings
from app.models.adapter_io import save_adapter, save_model
from app.models.loading import base_reference, empty_model, load_model, model_fingerprint
from app.models.lora import adalora_tuner, is_adapted
from app.tracking.record import ModelRecord, RunRecord
from app.tracking.run_folder import RunFolder
from app.training.checkpoint_io import TRAINED, read_checkpoint
from app.training.checkpoint_state import check_trained, saved_factors
from app.training.model_building import adapt
from app.training.module import LoraModule
from app.training.resume import resume_point
from app.training.resume_checks import WRITTEN, check_settings
from app.utils.files import read_yaml


def write_run_at_checkpoint(run: RunFolder, file: Path, target: RunFolder) -> None:
    """Write the adapter, or the model, of a checkpoint with the run's configuration and record.

    The record has the scores that do not depend on the training alone, and the checkpoint's step.

    Args:
        run: Has a configuration; it may be unfinished.
        file: A checkpoint of that run, also one without its optimizer.
        target: A folder that is there.

    Raises:
        InputError: There is no such run, or the checkpoint is damaged, another model's or another run's.
    """
    config = read_yaml(run.config, "--run")
    settings = config["model"]
    checkpoint = read_checkpoint(file, TRAINED)
    check_settings(resume_point(file, checkpoint, settings["method"]), config, WRITTEN)
    module = LoraModule(
        name=settings["name"],
        method=settings["method"],
        adapter=TypeAdapter(LoraSettings | None).validate_python(settings["adapter"]),
        adapter_path=settings["adapter_path"],
        dtype=settings["dtype"],
        quantization=settings.get("quantization"),
    )
    _load(module, checkpoint)
    if is_adapted(module.model):
        base, revision = base_reference(module.source)
        save_adapter(module.model, target.adapter, base, saved_factors(checkpoint), revision)
        module.tokenizer.save_pretrained(str(target.adapter))
    else:
        save_model(module.base, module.tokenizer, target.model)
    shutil.copyfile(run.config, target.config)
    record = RunRecord.read(run.summary) if run.summary.is_file() else module.record
    record.model = module.record.model
    record.metrics = {m: s for m, s in record.metrics.items() if m not in ("final", "test")}
    record.train.steps = checkpoint["global_step"]
    record.write(target.summary)


def _load(module: LoraModule, checkpoint: dict[str, Any]) -> None:
    """Give a module its model with a checkpoint's weights; beside a new LoRA adapter the base stays empty."""
    adapter, dtype = module.adapter, getattr(torch, module.dtype_name)
    # On the meta device PEFT marks AdaLoRA's number of triplets as trainable.
    is_lora = module.adapter_path is None and adapter is not None and adapter.adalora is None
    module.model = adapt((empty_model if is_lora else load_model)(module.source, dtype), module)
    module.record.model = ModelRecord(
        name=module.source.name, fingerprint=model_fingerprint(module.source)
    )
    check_trained(checkpoint, module, module.record.model)
    module.load_state_dict(checkpoint["state_dict"], strict=False, assign=is_lora)
    tuner = adalora_tuner(module.model)
    pruned = checkpoint["callbacks"].get("AdaLoraPruning")
    if tuner is not None and pruned:  # else (save_weights_only) what is pruned is written, as zeros
        load_allocator_state(tuner, pruned, torch.device("cpu"))
