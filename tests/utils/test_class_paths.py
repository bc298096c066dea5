"""Configurations of earlier versions, in today's names."""

import yaml

from app.utils.class_paths import in_current_settings, shorten_class_paths

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
    config = yaml.safe_load(in_current_settings(shorten_class_paths(OLD, lambda _: True)))
    settings = {"path": "commonsense_170k.json", "max_length": 256}
    assert config["data"] == {"class_path": "CommonsenseDataModule", "init_args": settings}
    names = [callback["class_path"] for callback in config["callbacks"]]
    assert names == ["AlignmentMonitor", "mine.inside_training.InsideTraining"]


def test_the_gamma_of_lora_ga_has_a_name_of_its_own():
    text = "init:\n  class_path: callbacks.NAME\n  init_args:\n    num_samples: 8\n    gamma: 32\n"
    text += "output:\n  gamma: 1\n"
    of_ga = text.replace("NAME", "lora_ga_init.LoraGaInit")
    assert in_current_settings(of_ga) == of_ga.replace("    gamma", "    stable_gamma")
    of_one = text.replace("NAME", "lora_one_init.LoraOneInit")
    assert in_current_settings(of_one) == of_one


def test_settings_of_other_classes_stay():
    text = OLD.replace("CommonsenseDataModule", "InstructionDataModule")
    assert in_current_settings(text) == text
