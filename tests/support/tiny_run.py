"""The configuration of a tiny run: 3 steps of a tiny model on a tiny SST-2."""

from pathlib import Path

CONFIG = """
trainer: {{max_steps: 3, log_every_n_steps: 1, accelerator: cpu}}
model:
  name: {model}
  adapter: {{r: 4}}
  optimizer: {{class_path: app.optim.preconditioned_adamw.PreconditionedAdamW, init_args: {{lr: 1.0e-2}}}}
  lr_scheduler_type: constant
data:
  class_path: data_modules.glue.GlueDataModule
  init_args: {{task: sst2, path: {data}, batch_size: 8, eval_batch_size: 7, validation_size: 20}}
init:
  class_path: callbacks.lora_one_init.LoraOneInit
  init_args: {{num_samples: 16, micro_batch_size: 4}}
output: {{name: tiny, root: {root}, wandb: disabled}}
"""


def write_tiny_run(file: Path, model: Path, data: Path, root: Path) -> Path:
    """Write a complete configuration; return the file."""
    file.write_text(CONFIG.format(model=model, data=data, root=root))
    return file
