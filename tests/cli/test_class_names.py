"""Class paths: what a run writes, what earlier ones wrote, and classes of the user's own."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.run_folders import losses, summary

EARLIER = Path(__file__).with_name("earlier_config.yaml")


def test_the_saved_config_names_own_classes_bare_and_others_by_their_path(fit):
    own = ("--config=methods/lora_ga.yaml", "--init.num_samples=16")
    user = "--trainer.callbacks=lightning.pytorch.callbacks.LearningRateMonitor"
    config = (fit(*own, user) / "config.yaml").read_text()
    assert sorted(re.findall(r"class_path: (\S+)", config)) == [
        *("GlueDataModule", "LoraGaInit"),
        *("lightning.pytorch.callbacks.LearningRateMonitor", "torch.optim.AdamW"),
    ]


@pytest.mark.slow
def test_a_run_folder_of_an_earlier_version(fit, command, run_models, sst2_folder):
    """Its classes lay in other modules, and one had another name."""
    folder = fit()
    scores, before = summary(folder)["metrics"]["final"], losses(folder)
    text = EARLIER.read_text().replace("MODEL", str(run_models / "llama"))
    text = text.replace("DATA", str(sst2_folder)).replace("ROOT", str(folder.parents[1]))
    (folder / "config.yaml").write_text(text)
    assert command("test", "--run", folder) == 0
    assert set(summary(folder)["metrics"]["test"]) == set(scores)
    config = ("--config", folder / "config.yaml", "--trainer.max_steps=5", "--ckpt_path=last")
    assert command("fit", *config, "--init.estimator.passes=auto") == 0
    after = losses(folder)
    assert {step: after[step] for step in before} == before
    assert len(after) == 5


@pytest.fixture
def current_folder(tmp_path, monkeypatch):
    """Stand in a folder where Python does not look for modules by itself."""
    monkeypatch.setattr(
        sys, "path", [place for place in sys.path if place not in ("", os.getcwd())]
    )
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "option", ["--data.class_path", "--trainer.callbacks+", "--model.optimizer"]
)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import not_there", r"ModuleNotFoundError: No module named 'not_there' \({}, line 1\)"),
        ("class Own(:", r"SyntaxError: invalid syntax \({}, line 1\)"),
        ("x = 1\nraise ValueError('own\\nwords')", r"ValueError: own words \({}, line 2\)"),
    ],
)
def test_the_error_of_a_module_of_the_users_own(
    option, content, reason, error_of, tiny_run, current_folder
):
    """A module in the current folder, which Python does not look into for a script that lies elsewhere."""
    (current_folder / "own_parts.py").write_text(content)
    told = error_of("fit", "--config", tiny_run, option, "own_parts.Own")
    where = reason.format(re.escape(str(current_folder / "own_parts.py")))
    assert re.search(f"names a class that cannot be imported: {where}$", told)


def test_a_class_in_the_current_folder(parsed, error_of, tiny_run, current_folder):
    own = "from data_modules.glue import GlueDataModule\nclass Own(GlueDataModule): pass\n"
    (current_folder / "own_data.py").write_text(own)
    config = parsed("--config", tiny_run, "--data.class_path", "own_data.Own")
    assert config.data.class_path == "own_data.Own"
    for name, module in (
        ("own_data.Nothing", ""),
        ("nowhere.Own", "PYTHONPATH have no module nowhere)"),
    ):
        told = error_of("fit", "--config", tiny_run, "--trainer.callbacks+", name)
        assert told.startswith(f"trainer.callbacks is '{name}', which is no class")
        assert told.endswith(module)
