"""Run an initialization callback as a fit does, without a trainer."""

from contextlib import nullcontext
from types import SimpleNamespace

from app.models.lora import base_model, lora_pairs
from app.tracking.record import RunRecord


def initialize(callback, model, batches):
    """Fill the adapter of a model from `add_lora`; return the run's record of it."""
    module = SimpleNamespace(
        model=model,
        base=base_model(model),
        lora_pairs=lambda: lora_pairs(model),
        record=RunRecord(),
    )
    trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        datamodule=SimpleNamespace(gradient_batches=lambda *_: batches),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    callback.on_fit_start(trainer, module)
    return module.record.init
