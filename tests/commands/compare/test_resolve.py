"""Which options go to which method, and which runs are no comparison."""

from unittest.mock import Mock

import pytest
import yaml

import app.commands.compare.command
from app.cli.resolve import resolve_run
from app.commands.compare.resolve import (
    RunOptions,
    check_validation,
    resolve_methods,
    rows_to_set_aside,
)
from app.utils.errors import InputError
from tests.support.compare_runs import OPTIONS
from tests.support.paths import ROOT

RATE = "--learning_rates=1e-3"


def test_only_the_run_that_is_meant_is_checked(tiny_run, tmp_path):
    """Not a method's configuration without its own options, nor that of a method nobody asked for."""
    file = tmp_path / "wide.yaml"
    file.write_text("model: {adapter: {r: 16}}")  # above AdaLoRA's usual init_r
    for method in ("adalora", "lora"):
        resolve = Mock(side_effect=resolve_run)
        names = [str(tiny_run), str(file)]
        options = RunOptions(names, ["--model.adapter.adalora.init_r=20"], resolve)
        run = resolve_methods([method], ["lora", "adalora"], options)[method]
        adapter = run.resolved["model"]["adapter"]
        assert adapter["r"] == 16
        parsed = [call.args[0] for call in resolve.call_args_list]
        own = [options for options in parsed if f"--config=methods/{method}.yaml" in options]
        assert len(own) == (2 if method == "adalora" else 3)
        if method == "adalora":
            assert adapter["adalora"]["init_r"] == 20


@pytest.mark.slow
def test_options_of_a_method_go_to_those_that_have_them(
    refused, compare, started, tmp_path, capsys
):
    """None brings back the initialization that an overlay has switched off."""
    wanted = ("--methods=lora,pissa,lora_one,full", RATE)
    options = (*OPTIONS, "--model.adapter.r", "2", "--model.optimizer.init_args.damping=1e-3")
    assert compare(*wanted, options=options) == 0
    printed = capsys.readouterr().out
    assert "init.num_samples goes to lora_one; lora, pissa, full: no such setting" in printed
    assert "model.adapter.r goes to lora, pissa, lora_one; full: no such setting" in printed
    assert "model.optimizer.damping goes to lora_one; lora, pissa, full" in printed
    models, inits = {}, {}
    for method in ("lora", "pissa", "lora_one", "full"):
        run = tmp_path / "runs" / "compare_tiny" / "cells" / f"{method}-lr1e-3-seed0" / "version_0"
        config = yaml.safe_load((run / "config.yaml").read_text())
        models[method], inits[method] = config["model"], config["init"]
    assert inits["lora"] is inits["full"] is models["full"]["adapter"] is None
    assert inits["pissa"]["class_path"] == "PissaInit"
    assert inits["lora_one"]["init_args"]["num_samples"] == 4
    assert models["lora_one"]["optimizer"]["init_args"]["damping"] == 1e-3
    assert {models[m]["adapter"]["r"] for m in ("lora", "pissa", "lora_one")} == {2}
    # A task of an array may have no method with the setting; a misspelt one no method at all has.
    started.clear()
    assert compare(RATE, "--methods=lora", "--launch=slurm", "--name=other") == 0
    assert "init.num_samples: lora: no such setting" in capsys.readouterr().out
    message = refused("--methods=lora,pissa", RATE, options=("--init.gama=1",))
    assert "there is no setting init.gama; did you mean init.gamma?" in message


def test_training_rows_are_set_aside_where_the_configuration_has_none(tiny_run, command, capfd):
    run = resolve_run([f"--config={tiny_run}", "--data.validation_size=null"])
    rows = len(run.data.rows("train"))
    assert rows_to_set_aside(run) == rows // 5 > 0
    with pytest.raises(InputError, match="are the rows that the test reports"):
        check_validation(run)
    separate = resolve_run([f"--config={tiny_run}", f"--data.validation_size={rows // 5}"])
    assert rows_to_set_aside(separate) is None
    check_validation(separate)
    none = resolve_run([f"--config={tiny_run}", "--data.validation_size=0"])
    with pytest.raises(
        InputError, match=r"glue/sst2 has no validation rows.*--data.validation_size"
    ):
        check_validation(none)
    # The command does so by itself, whatever comes of it.
    options = ("--methods=lora", RATE, "--data.validation_size=null", "--launch=slurm")
    assert command("compare", "--config", tiny_run, *options) == 0
    message = f"{rows // 5} training rows are set aside to choose learning rates on"
    assert message in capfd.readouterr().out


def test_runs_that_are_no_comparison(refused, tmp_path, monkeypatch):
    methods = tmp_path / "configs" / "methods"
    methods.mkdir(parents=True)
    lora = (ROOT / "configs" / "methods" / "lora.yaml").read_text()
    (methods / "lora.yaml").write_text(lora)
    (methods / "same.yaml").write_text(lora.replace("method: lora", "method: same"))
    (methods / "longer.yaml").write_text(lora + "trainer: {max_epochs: 7}\n")
    monkeypatch.setattr(app.commands.compare.command, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr("app.tracking.config_files.CONFIGS", tmp_path / "configs")
    monkeypatch.setattr("app.commands.compare.resolve.rows_to_set_aside", lambda run: None)
    for names, options, message in (
        ("lora,same", OPTIONS[:2], "lora and same come to the same settings"),
        ("lora,longer", OPTIONS[:2], "lora and longer differ in trainer.max_epochs (None, 7)"),
        ("lora", ("--data.validation_size=null",), "are the rows that the test reports"),
    ):
        assert message in refused(f"--methods={names}", RATE, options=options)
