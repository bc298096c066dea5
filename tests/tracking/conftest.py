"""Fixtures of the tests of loggers."""

import io
import sys

import pytest
import wandb


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Take away every key of W&B, and whatever could answer a question."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no_settings"))
    stdin = io.StringIO()
    stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    wandb.teardown()  # it reads its environment once
    yield
    wandb.teardown()
