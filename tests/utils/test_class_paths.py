"""Configurations of earlier versions, in today's names."""

import yaml

from app.utils.class_paths import shorten_class_paths, without_dropped_settings

OLD = """
data:
  class_path: data_modules.commonsense.CommonsenseDataModule
  init_args:
    path: commonsense_170k.json
    hub_id: yahma/alpaca-cleaned
    drop_refusals: false
    max_length: 256
callbacks:
  - class_path: callbacks.inside_training.InsideTraining
  - class_path: mine.inside_training.InsideTraining
"""


def test_a_saved_configuration_of_an_earlier_version():
    config = yaml.safe_load(without_dropped_settings(shorten_class_paths(OLD, lambda _: True)))
    settings = {"path": "commonsense_170k.json", "max_length": 256}
    assert config["data"] == {"class_path": "CommonsenseDataModule", "init_args": settings}
    names = [callback["class_path"] for callback in config["callbacks"]]
    assert names == ["AlignmentMonitor", "mine.inside_training.InsideTraining"]


def test_settings_of_other_classes_stay():
    text = OLD.replace("CommonsenseDataModule", "InstructionDataModule")
    assert without_dropped_settings(text) == text
