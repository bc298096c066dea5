"""Run every command with each method, model family and data module; `TABLES` says with which."""

import contextlib
import copy
import io
import json
import math
from typing import NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    SiglipVisionConfig,
)

from app.models.loading import load_model
from app.models.source import resolve_model
from tests.support.matrix_data import BENCHMARKS, DATA, benchmark_data
from tests.support.paths import ROOT
from tests.support.run_folders import summary, weights
from tests.support.watched_fit import logits

COMMANDS = ("plan", "init", "one_step", "fit", "validate", "test")
COMMANDS += ("export", "export --as lora", "export --merge", "resume")
ON_THE_RUN = COMMANDS[4:]
ASKING = ("plan", "fit", "validate", "test", "test --run")
METHODS = tuple(sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")))
FAMILIES = ("Llama", "GPT-2", "T5", "Gemma-3", "Gemma-3 with vision", "Mixtral")
KINDS = {"causal": "Llama", "sequence-to-sequence": "T5"}


class Table(NamedTuple):
    """Each row with each column has an outcome for each command."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    commands: tuple[str, ...]
    on_the_run: tuple[str, ...]
    """The commands that read what `fit` leaves."""


TABLES = {
    "Methods": Table(METHODS, FAMILIES, COMMANDS, ON_THE_RUN),
    "Data modules": Table(tuple(DATA), tuple(KINDS), COMMANDS, ON_THE_RUN),
    "Benchmarks": Table(BENCHMARKS, tuple(KINDS), ASKING, ()),
}
RUNS, NO_RUN = "runs", "no run"  # the outcomes that are no refusal

CONFIG = {
    "trainer": {"max_steps": 2, "log_every_n_steps": 1, "accelerator": "cpu"},
    "model": {"adapter": {"r": 4}, "optimizer": {"init_args": {"lr": 0.001}}},
    "init": {"class_path": "LoraOneInit", "init_args": {"num_samples": 4, "micro_batch_size": 4}},
    "output": {"name": "m", "wandb": "disabled"},
}
CONFIG["model"]["optimizer"]["class_path"] = "PreconditionedAdamW"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
DECODER = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 128}
DECODER |= {"max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": 1}
DECODER |= {"bos_token_id": 2}


def _gemma3():
    return Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=64)


def _gemma3_with_vision():
    vision = SiglipVisionConfig(**SIZES, num_hidden_layers=1, image_size=32, patch_size=8)
    tokens = {"image_token_index": 125, "boi_token_index": 126, "eoi_token_index": 127}
    return Gemma3Config(
        text_config=_gemma3(), vision_config=vision, mm_tokens_per_image=4, **tokens
    )


def _mixtral():
    return MixtralConfig(**DECODER, num_local_experts=8, num_experts_per_tok=2)


def each_cell(table, *columns):
    """Parametrize a test with the rows and columns of a table, or with some of its columns."""
    rows, chosen = TABLES[table].rows, columns or TABLES[table].columns
    marks = [
        pytest.mark.parametrize("row", rows),
        pytest.mark.parametrize("column", chosen),
    ]
    return lambda test: marks[0](marks[1](test))


@pytest.fixture(scope="session")
def matrix_models(tmp_path_factory, run_models, tiny_llama, tiny_gpt2, tiny_t5):
    """Return a folder with a model of one layer for each of `FAMILIES`."""
    build = {
        "Llama": lambda: tiny_llama(**DECODER),
        "GPT-2": lambda: tiny_gpt2(n_layer=1),
        "T5": lambda: tiny_t5(num_layers=1),
        "Gemma-3": lambda: Gemma3ForCausalLM(_gemma3()),
        "Gemma-3 with vision": lambda: Gemma3ForConditionalGeneration(_gemma3_with_vision()),
        "Mixtral": lambda: MixtralForCausalLM(_mixtral()),
    }
    folder = tmp_path_factory.mktemp("matrix")
    for name in FAMILIES:
        torch.manual_seed(0)
        build[name]().save_pretrained(folder / name)
        for file in (run_models / "llama").glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


class Trial:
    """Run the commands of one row and column.

    Args:
        command: The fixture; returns the exit status.
        folder: Of this row and column alone.
        logged: The fixture; the scores that a command logs.
        watched: The fixture; the logits of the model that has just been trained.
        loaded: A list that grows with each model whose weights are loaded.
        names: The commands that are run.
    """

    def __init__(self, command, folder, logged, watched, loaded, names):
        self.command, self.folder, self.names = command, folder, names
        self.logged, self.watched, self.loaded = logged, watched, loaded
        self.run = folder / "runs" / "m" / "version_0"
        self.as_lora = folder / "as_lora"

    def of_run(self, model, data, *options):
        """Return what comes of those of `COMMANDS` that are run.

        Args:
            model: The model's folder.
            data: The section `data`.
            options: Of the commands that read no run.
        """
        given = (*self._config(model, data), *options)
        run = ("--run", self.run)
        return self._outcomes(
            {
                "plan": ("plan", *given),
                "init": ("init", *given),
                "one_step": ("one_step", *given, "--eta_rows=4", "--etas=0.1,1"),
                "fit": ("fit", *given),
                "validate": ("validate", *run),
                "test": ("test", *run),
                "export": ("export", *run),
                "export --as lora": ("export", *run, "--as=lora", "--output", self.as_lora),
                "export --merge": ("export", *run, "--merge"),
                "resume": ("fit", *given, "--ckpt_path=last", "--trainer.max_steps=3"),
            },
            ON_THE_RUN,
        )

    def of_benchmark(self, model, data, trained):
        """Return what comes of those of `ASKING` that are run, with an overlay such as those in configs/eval.

        Args:
            model: The model's folder.
            data: The section `data` of the overlay.
            trained: That of a run which is asked, too.
        """
        given = self._config(model, trained)
        assert self.outcome("fit", "fit", *given) == RUNS
        overlay = self.folder / "overlay.yaml"
        overlay.write_text(yaml.safe_dump({"model": {"adapter": None}, "data": data}))
        given, run = (*given, "--config", overlay), ("--run", self.run, "--config", overlay)
        self.run = self.run.with_name("version_1")
        commands = {name: (name, *given) for name in ASKING[:-1]}
        return self._outcomes({**commands, "test --run": ("test", *run)})

    def _config(self, model, data):
        config = {**copy.deepcopy(CONFIG), "data": data}
        config["model"]["name"] = str(model)
        self.model = model
        self.placeholders = {str(self.run): "RUN", str(model): "MODEL", data["class_path"]: "DATA"}
        config["output"]["root"] = str(self.folder / "runs")
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        return ("--config", file)

    def _outcomes(self, commands, on_the_run=()):
        found = {}
        for name in filter(self.names.__contains__, commands):
            lacks_run = name in on_the_run and found["fit"] != RUNS
            found[name] = NO_RUN if lacks_run else self.outcome(name, *commands[name])
        return found

    def outcome(self, name, *argv):
        """Return what comes of a command; one that runs must leave what it is for."""
        self.logged.clear()
        self.loaded.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = self.command(*argv)
        out, err = out.getvalue(), err.getvalue()
        assert "Traceback" not in err, err
        if status == 0:
            self._check(name, out)
            return RUNS
        assert status == 2, (argv, status, err)
        [line] = [line for line in err.splitlines() if line.startswith("error: ")]
        assert not self.loaded, "refused when the weights were loaded"
        if name in ("plan", "init", "one_step", "fit"):
            assert not self.run.exists(), "a run that never began left its folder"
        whole = err[err.index(line) :].removeprefix("error: ")
        for text, stands_for in self.placeholders.items():
            whole = whole.replace(text, stands_for)
        return " ".join(whole.split())

    def _check(self, name, out):
        if name == "plan":
            assert "\nfits: " in out
            assert not self.run.exists()
        elif name in ("fit", "resume"):
            told = summary(self.run)
            assert told["train"]["steps"] == (2 if name == "fit" else 3)
            assert all(map(math.isfinite, told["metrics"]["final"].values()))
            assert weights(self.run)
        elif name == "one_step":
            told = json.loads((self.run.with_name("one_step") / "summary.json").read_text())
            assert {step["rank"] for step in told["steps"]} == {4, "full"}
        elif name == "init":
            assert load_file(self.run.with_name("init") / "adapter_model.safetensors")
        elif name == "export":
            [file] = (self.run / "exported_adapter").glob("*.safetensors")
            exported, trained = load_file(file), weights(self.run)
            assert exported.keys() == trained.keys()
            assert all(torch.equal(exported[name], trained[name]) for name in trained)
        elif name == "export --as lora":
            base = load_model(resolve_model(str(self.model)))
            self._check_trained(PeftModel.from_pretrained(base, self.as_lora))
        elif name == "export --merge":
            self._check_trained(load_model(resolve_model(str(self.run / "merged"))))
        else:
            assert self.logged
            assert all(map(math.isfinite, self.logged.values())), self.logged

    def _check_trained(self, model):
        trained = self.watched["logits"]
        torch.testing.assert_close(logits(model), trained, atol=2e-5, rtol=1e-3)


@pytest.fixture
def loaded(monkeypatch):
    """Return a list that grows with each model whose weights are loaded."""
    sources = []

    def load(source, *options):
        sources.append(source)
        return load_model(source, *options)

    monkeypatch.setattr("app.training.model_building.load_model", load)
    return sources


@pytest.fixture
def tried(command, tmp_path, monkeypatch, logged, watched_fit, loaded, matrix_models, page):
    """Return `tried(table, row, column)`, which runs the commands and holds their outcomes against the page."""
    monkeypatch.setattr("app.commands.one_step.report.draw", lambda *_: None)

    def run(table, row, column):
        names = page.tried(table, row, column)
        trial = Trial(command, tmp_path, logged, watched_fit, loaded, names)
        model = matrix_models / KINDS.get(column, column)
        if table == "Methods":
            options = (f"--config=methods/{row}.yaml",)
            options += ("--init.num_samples=4",) if row in ("lora_ga", "lora_sb") else ()
            found = trial.of_run(model, DATA["GlueDataModule"](tmp_path), *options)
        elif table == "Data modules":
            found = trial.of_run(model, DATA[row](tmp_path))
        else:
            trained = DATA["GlueDataModule"](tmp_path)
            found = trial.of_benchmark(model, benchmark_data(row, tmp_path), trained)
        page.expect((table, row, column), found)

    return run
