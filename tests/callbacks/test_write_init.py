"""WriteInit where the disk is full: the rest of it is tested by `tests/cli/test_init_cli.py`."""

import errno
from types import SimpleNamespace

import pytest

from app.models.adapter_config import LoraSettings
from app.models.lora import add_lora
from app.models.source import resolve_model
from app.tracking.record import RunRecord
from app.utils.errors import InputError
from callbacks.write_init import WriteInit


def test_an_adapter_that_cannot_be_written_leaves_nothing(
    tiny_model_dir, tiny_llama, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("callbacks.write_init.save_adapter", full)
    module = SimpleNamespace(
        record=RunRecord(method="lora"),
        model=add_lora(tiny_llama(), LoraSettings(r=4)),
        source=resolve_model(str(tiny_model_dir)),
    )
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(describe=lambda: {"name": "toy", "rows": {}})
    )
    target = tmp_path / "made"
    with pytest.raises(
        InputError, match=r"to --output '.*made' \(No space left on device\): make room"
    ):
        WriteInit(target, 0, {}).on_fit_end(trainer, module)
    assert [path.name for path in tmp_path.iterdir()] == [tiny_model_dir.name]
