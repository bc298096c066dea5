"""A checkpoint exported is what the run would have left, had it ended there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.run_folders import summary


def exported(folder, name="adapter"):
    """Return the tensors and the configuration that are in a folder."""
    [file] = folder.glob("*.safetensors")
    config = json.loads(
        (folder / f"{name}_config.json" if name else folder / "config.json").read_text()
    )
    if "target_modules" in config:
        config["target_modules"].sort()  # PEFT keeps a set
    config.pop("total_step", None)  # of AdaLoRA's schedule, which is over
    return load_file(file), config


def check_same(written, left, name="adapter"):
    (tensors, config), (expected, expected_config) = exported(written, name), exported(left, name)
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key
    assert config == expected_config


def test_one_of_the_users_own_checkpoints(fit, command, tmp_path, capsys, logged):
    """Without its optimizer, and of a run that never ended: as a run that ended at its step."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n    init_args:\n"
        "      {filename: '{step}', save_top_k: -1, every_n_train_steps: 2, save_weights_only: true}\n"
    )
    short, folder = fit("--trainer.max_steps=2"), fit("--config", own, "--trainer.max_steps=5")
    file = folder / "checkpoints" / "step=2.ckpt"
    # It can be scored, too.
    assert command("validate", "--config", folder / "config.yaml", "--ckpt_path", file) == 0
    assert logged["val/loss"] == pytest.approx(summary(short)["metrics"]["final"]["loss"], abs=1e-6)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "adapter")
    assert command("export", "--run", folder, "--ckpt_path", file) == 0
    assert f"wrote {folder / 'exported_adapter'}" in capsys.readouterr().out
    check_same(folder / "exported_adapter", short / "adapter")
    card = (folder / "exported_adapter" / "README.md").read_text()
    assert "lora-one" in card
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "lora_ga", "adalora", "dora", "full"])
def test_the_last_checkpoint_is_what_the_run_has_left(method, fit, command):
    options = ("--model.adapter.adalora.init_r=6",) if method == "adalora" else ()
    folder = fit(f"--config=methods/{method}.yaml", "--trainer.max_steps=6", *options)
    [file] = (folder / "checkpoints").iterdir()
    kind = ("--merge",) if method == "full" else ()
    target = folder.parent / "target"
    given = ("--ckpt_path", file, *kind, "--output", target)
    assert command("export", "--run", folder, *given) == 0
    if method == "full":
        check_same(target, folder / "model", name="")
    else:
        check_same(target, folder / "adapter")
    assert summary(folder)["metrics"]["final"]


def test_another_file_is_refused(fitted, error_of, tmp_path):
    folder = fitted()
    [file] = (folder / "checkpoints").iterdir()
    content = torch.load(file, weights_only=True)
    first = next(iter(content["state_dict"]))
    del content["state_dict"][first]
    torch.save(content, tmp_path / "other.ckpt")
    told = error_of("export", "--run", folder, "--ckpt_path", tmp_path / "other.ckpt")
    assert "the checkpoint has no weight for" in told
    told = error_of("export", "--run", folder, "--ckpt_path", folder / "summary.json")
    assert "which cannot be read as a checkpoint" in told
    assert not (folder / "exported_adapter").exists()


def test_the_checkpoint_of_another_run_is_refused(fitted, fit, error_of, tmp_path, monkeypatch):
    """Of the same shapes, which this run's scaling would make another adapter of."""
    own, options = fitted(), ("--model.adapter.lora_alpha=64", "--init=null")
    [file] = (fit(*options) / "checkpoints").iterdir()
    monkeypatch.setattr("app.training.model_building.load_model", None)
    other = f"the checkpoint {str(file)!r} is of a run with other settings: "
    alpha = "model.adapter.lora_alpha 64.0 (now 16.0). Give that run, or another ckpt_path"
    for merge in ((), ("--merge",)):
        told = error_of("export", "--run", own, "--ckpt_path", file, *merge)
        assert told == f"{other}init null (now LoraOneInit), {alpha}"
    for name in ("validate", "test"):
        assert error_of(name, "--run", own, "--ckpt_path", file) == other + alpha
    content = torch.load(file, weights_only=True)
    torch.save(content | {"method": "lora"}, file)
    told = error_of("export", "--run", own, "--ckpt_path", file)
    assert "belongs to the method 'lora', but model.method is 'lora_one'" in told
