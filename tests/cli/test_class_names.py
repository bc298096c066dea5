"""Configurations outlive a move of the project's classes: what a run writes, and what earlier ones wrote."""

from pathlib import Path

import pytest
import yaml

from tests.support.run_folders import losses, summary

EARLIER = Path(__file__).with_name("earlier_config.yaml")


def class_paths(value):
    """Return all values of `class_path` in a configuration."""
    if isinstance(value, dict):
        own = [value["class_path"]] if "class_path" in value else []
        return own + [path for inner in value.values() for path in class_paths(inner)]
    return (
        [path for inner in value for path in class_paths(inner)] if isinstance(value, list) else []
    )


def test_the_saved_config_names_own_classes_bare_and_others_by_their_path(fit):
    own = ("--config=methods/lora_ga.yaml", "--init.num_samples=16")
    user = "--trainer.callbacks=lightning.pytorch.callbacks.LearningRateMonitor"
    config = yaml.safe_load((fit(*own, user) / "config.yaml").read_text())
    assert sorted(class_paths(config)) == [
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
    assert command("fit", *config) == 0
    after = losses(folder)
    assert {step: after[step] for step in before} == before
    assert len(after) == 5
