"""The LightningModule, its checks, checkpoints and resume points."""
