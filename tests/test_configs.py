"""Every shipped configuration against the real signatures, without running it."""

import pytest
import yaml

import app.cli
import app.config_files

THEORY = app.config_files.CONFIGS / "theory"  # another command's, see test_theory_command.py
FILES = sorted(f for f in app.config_files.CONFIGS.rglob("*.yaml") if f.parent != THEORY)
COMPLETE = [file for file in FILES if file.parent == app.config_files.CONFIGS]
OVERLAYS = [file for file in FILES if file.parent != app.config_files.CONFIGS]


def name_of(file):
    return str(file.relative_to(app.config_files.CONFIGS))


@pytest.fixture
def parsed(monkeypatch, command):
    """Return the configuration that `fit` comes to."""

    def parse(*argv):
        found = []
        monkeypatch.setattr(app.cli.LoraCLI, "instantiate_classes", lambda cli: None)
        monkeypatch.setattr(
            app.cli.LoraCLI, "_run_subcommand", lambda cli, name: found.append(cli.config[name])
        )
        assert command("fit", *argv) == 0
        return found[0]

    return parse


def test_all_are_here():
    assert len(FILES) == 12
    assert len(COMPLETE) == 6


@pytest.mark.parametrize("file", COMPLETE, ids=name_of)
def test_complete_configs(file, parsed):
    """A complete file runs by itself: nothing is required beside it, and its first line says how."""
    first = file.read_text().splitlines()[0]
    assert first == f"# python train.py fit --config {file.name}"
    config = parsed("--config", file)
    assert config.output.name == file.stem
    assert config.trainer.max_steps > 0 or config.trainer.max_epochs > 0
    assert config.model.method == "lora_one"
    assert config.init.class_path == "callbacks.lora_one_init.LoraOneInit"
    if file.stem.startswith("glue_"):
        assert config.data.init_args.task == file.stem.removeprefix("glue_")


@pytest.mark.parametrize("file", OVERLAYS, ids=name_of)
def test_overlays(file, parsed):
    """An overlay changes what it names, and nothing else, in a complete configuration."""
    assert file.read_text().splitlines()[0].startswith("# Overlay")
    before = parsed("--config", "glue_sst2.yaml").as_dict()
    after = parsed("--config", "glue_sst2.yaml", "--config", file).as_dict()
    content = yaml.safe_load(file.read_text())
    sections = {"strategies": {"trainer"}}.get(file.parent.name, {"model", "init"})
    assert set(content) <= sections
    if file.parent.name == "strategies":
        assert set(content["trainer"]) == {"strategy"}
        content = {"trainer": {}}
        before["trainer"] = {**before["trainer"], "strategy": after["trainer"]["strategy"]}
        assert after["trainer"] == before["trainer"]
    for section in set(before) - {"config", *content}:
        assert after[section] == before[section]
    assert after["model"]["adapter"] == before["model"]["adapter"]
    if file.parent.name == "methods":
        assert after["model"]["method"] == file.stem
        assert after["model"]["name"] == before["model"]["name"]
