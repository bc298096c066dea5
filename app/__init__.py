"""A LightningModule that fine-tunes language models with LoRA-One, and the rooms it is built of."""
