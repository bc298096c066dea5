"""Random single mistakes in command lines and files: one line that names each, before weights are loaded."""

import gzip
import json
import shutil
import warnings

import pytest
import yaml

import app.training.model_building
from tests.support.mistakes import Mistakes, is_named, is_one_line
from tests.support.report_runs import grid_run, manifest
from tests.support.tiny_run import CONFIG
from tests.support.wrong_command_lines import RUN

ACCEPTED = {
    "out of range": "a number that is large or small, and no mistake to the program",
    "name of nothing": "a name that is free to choose, or of a part that the command does not use",
    "field": "a field that has a default, or that the command does not read",
    "row": "a row that is text all the same",
}
"""Kinds of mistakes of which some cannot be told from a choice."""
SPARED = (
    "tokenizer_config.json",
    "metrics.csv",
    "compare.json",
    "dev.tsv",
    "config.yaml truncated",
)
"""Files that a command does without, with defaults or a warning; a part of a YAML file may be one, too."""
FAST = 12
CHUNKS = [range(FAST), *(range(start, start + 48) for start in range(FAST, 300, 48))]


@pytest.fixture(scope="module")
def template(tmp_path_factory, run_models, sst2_folder):
    """Return a folder with a model, data, configurations, a finished run and a comparison."""
    from app.cli.main import main

    folder = tmp_path_factory.mktemp("fuzz") / "template"
    folder.mkdir()
    shutil.copytree(run_models / "llama", folder / "model")
    shutil.copytree(sst2_folder, folder / "data")
    text = CONFIG.format(model="model", data="data", root="runs")
    (folder / "config.yaml").write_text(text)
    rows = [{"instruction": f"add {i}", "input": "", "output": f"x + {i}"} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    config = yaml.safe_load(text)
    sizes = {"validation_size": 4, "batch_size": 4, "eval_batch_size": 4}
    config["data"] = {
        "class_path": "InstructionDataModule",
        "init_args": {"path": "rows.jsonl", **sizes},
    }
    config["init"]["init_args"]["num_samples"] = 4
    (folder / "rows.yaml").write_text(yaml.safe_dump(config))
    for rate in (1e-3, 1e-2):
        grid_run(folder / "grid", "lora", rate, 0)
    manifest(folder / "grid", [["lora", 1e-3, 0], ["lora", 1e-2, 0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        assert main(["fit", "--config", "config.yaml"]) == 0
    # The run names its model by an absolute path, and each mistake is made in a copy of the folder.
    text = (folder / RUN / "config.yaml").read_text().replace(f"{folder}/", "")
    for file in (folder / RUN / "config.yaml", folder / "config.yaml"):
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(seeds, marks=pytest.mark.slow(seconds=20) if i else ())
        for i, seeds in enumerate(CHUNKS)
    ],
    ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}",
)
def test_mistakes(seeds, template, command, monkeypatch, tmp_path, capsys):
    loads = []
    load_model = app.training.model_building.load_model

    def counted(*arguments, **options):
        model = load_model(*arguments, **options)
        loads.append(model)
        return model

    monkeypatch.setattr("app.training.model_building.load_model", counted)
    warnings.simplefilter("ignore")
    config = yaml.safe_load((template / "config.yaml").read_text())
    wrong, accepted = [], 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(template, folder)
        monkeypatch.chdir(folder)
        mistake = Mistakes(config, folder).make(seed)
        loads.clear()
        status = command(*mistake.argv)
        told = capsys.readouterr().err
        if status == 0:
            accepted += 1
            spared = mistake.kind.startswith("file ") and any(f in mistake.what for f in SPARED)
            fine = spared or mistake.kind in ACCEPTED
        else:
            line = next((line for line in told.splitlines() if line.startswith("error: ")), "")
            fine = status == 2 and is_one_line(told) and is_named(line, mistake) and not loads
        if not fine:
            wrong.append((seed, mistake.what, mistake.argv, status, told[-300:], len(loads)))
        shutil.rmtree(folder)
    assert wrong == [], wrong
    assert accepted <= len(seeds) / 3
