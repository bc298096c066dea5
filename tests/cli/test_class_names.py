"""Configurations outlive a move of the project's classes: what a run writes, and what earlier ones wrote."""

import re
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
    assert command("fit", *config) == 0
    after = losses(folder)
    assert {step: after[step] for step in before} == before
    assert len(after) == 5
