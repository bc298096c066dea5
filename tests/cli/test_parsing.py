"""What parsing takes: parsers, defaults and texts of the settings are made once and are those made anew."""

import pytest

from app.cli.lora_cli import LoraCLI
from app.cli.resolve import resolve_run
from app.models.adapter_config import LoraSettings
from app.utils.arguments import Parser
from app.utils.class_paths import bare_name, shorten_class_paths
from app.utils.files import load_yaml

CONFIG = ("--config=quickstart.yaml",)
OTHER = (*CONFIG, "--config=methods/lora.yaml", "--data=GlueDataModule", "--data.task=cola")


@pytest.fixture
def no_parser_yet(monkeypatch):
    monkeypatch.setattr(LoraCLI, "made_parsers", {})


@pytest.fixture
def calls(monkeypatch):
    """Return the names of the parsers' methods, one for each call."""
    seen = []
    for name in ("__init__", "validate"):
        method = getattr(Parser, name)

        def call(parser, *args, method=method, name=name, **kwargs):
            seen.append(name)
            return method(parser, *args, **kwargs)

        monkeypatch.setattr(Parser, name, call)
    return seen


def test_commands_that_follow_make_no_parser(no_parser_yet, parsed, calls):
    first, other = parsed(*CONFIG), parsed(*OTHER)
    assert "__init__" in calls
    calls.clear()
    assert parsed(*CONFIG) == first != other
    assert parsed(*OTHER) == other
    assert "__init__" not in calls
    assert parsed(*CONFIG, subcommand="test") != first
    assert "__init__" in calls


def test_a_parser_that_has_raised_is_made_anew(parsed, error_of, calls):
    first = parsed(*CONFIG)
    assert "model.nmae" in error_of("fit", *CONFIG, "--print_config", "--model.nmae=x")
    calls.clear()
    assert parsed(*CONFIG) == first  # and prints nothing instead
    assert "__init__" in calls


def test_defaults_are_made_once(monkeypatch):
    parser = Parser()
    parser.add_class_arguments(LoraSettings, "adapter")
    defaults = parser.get_defaults()
    assert defaults.adapter.r == LoraSettings().r
    defaults.adapter.r, defaults.adapter.rank_pattern["q_proj"] = 3, 2
    assert parser.get_defaults().adapter.r == LoraSettings().r
    assert parser.get_defaults().adapter.rank_pattern == {}
    parser.set_defaults({"adapter.r": 5})
    assert parser.get_defaults().adapter.r == 5
    parser.add_argument("--late", type=int, default=7)
    assert parser.get_defaults().late == 7
    monkeypatch.setattr("jsonargparse.ArgumentParser.get_defaults", None)
    assert parser.get_defaults().late == 7


@pytest.mark.parametrize("options", [CONFIG, OTHER], ids=["quickstart", "overlays"])
def test_the_text_of_settings_is_that_of_a_dump_which_checks_them(options, calls):
    run = resolve_run([*options, "--model.adapter.lora_alpha=${model.adapter.r}"])
    calls.clear()
    del run.config_text
    text = run.config_text
    assert calls == []
    checked = run.parser.dump(run.config, skip_unset=False)
    assert calls
    assert text == shorten_class_paths(checked, lambda path: bare_name(path) != path)
    assert load_yaml(text)["ckpt_path"] is None


@pytest.mark.parametrize("joined", [True, False])
def test_a_mapping_is_no_text(joined, error_of, tmp_path):
    config = ("--config=quickstart.yaml", f"--output.root={tmp_path}")
    name, value = "--output.wandb_group", '{"a": {"b": 1}}'
    told = error_of("fit", *config, *([f"{name}={value}"] if joined else [name, value]))
    assert told == 'output.wandb_group is {"a": {"b": 1}}: expected text'
