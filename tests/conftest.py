"""Fixtures for all tests: tiny models and a tokenizer built in code, and the real SmolLM2-135M."""

import functools
import gc
import os
import random
import string
from collections import Counter

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with a thread for each core in each of them they would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from app.models.loading import local_directory
from app.models.source import resolve_model
from tests.support.compare_runs import compare, refused, started  # noqa: F401 (fixtures)
from tests.support.paths import ROOT
from tests.support.report_runs import ranks, report, runs  # noqa: F401 (fixtures)
from tests.support.run_hooks import killed_at, logged, passes, signalled  # noqa: F401 (fixtures)
from tests.support.sandboxes import bubblewrap, mode  # noqa: F401 (fixtures)
from tests.support.tiny_run import write_tiny_run
from tests.support.watched_fit import watched_fit  # noqa: F401 (fixture)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0, 1, 2, 3
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
VOCAB_SIZE = 128


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests, too")
    parser.addoption("--write-support", action="store_true", help="write docs/support.md anew")


def pytest_collection_modifyitems(config, items):
    """Deselect the slow tests, unless all are asked for, or whoever names files or markers has chosen.

    Files that take longest come first: the last file of a run keeps one process alone.
    """
    named = config.args_source is config.ArgsSource.ARGS
    if not (config.option.full or config.option.markexpr or named):
        slow = [item for item in items if not _is_fast(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if _is_fast(item)]
    seconds = Counter()
    for item in items:
        seconds[item.path] += _seconds(item)
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish():
    """Keep the collector from walking through all that has been imported, again and again."""
    gc.freeze()


def _seconds(item):
    """Return about how long a test takes; those of the fast tier count as nothing."""
    usual = {"slow": 2, "multiprocess": 6, "smollm2": 10}
    marks = [mark for mark in item.iter_markers() if mark.name in usual]
    return max((mark.kwargs.get("seconds", usual[mark.name]) for mark in marks), default=0)


def _is_fast(item):
    real = item.get_closest_marker("smollm2")
    if real is not None and not real.kwargs.get("fast", False):
        return False
    return not any(item.get_closest_marker(name) for name in ("slow", "multiprocess"))


@pytest.fixture(autouse=True)
def _settled_environment(monkeypatch):
    """Seed every generator; let nothing talk to Weights & Biases, or wait for the disk."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test use the global generator
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def _builder(model_class, config_class, **defaults):
    """Return `build(seed=0, **config)`, which makes a model and leaves the global generator alone."""

    def build(seed=0, **config):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(config_class(**{**defaults, **config})).eval()

    return build


@pytest.fixture(scope="session")
def tiny_llama():
    """Return `build(seed=0, **config)`, which makes a Llama of 2 layers, queries grouped."""
    return _builder(
        LlamaForCausalLM,
        LlamaConfig,
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        **SPECIAL_IDS,
    )


@pytest.fixture(scope="session")
def tiny_gpt2():
    """Return `build(seed=0, **config)`, which makes a GPT-2 of 2 layers (of Conv1D)."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    return _builder(GPT2LMHeadModel, GPT2Config, vocab_size=VOCAB_SIZE, **sizes, **SPECIAL_IDS)


@pytest.fixture(scope="session")
def tiny_t5():
    """Return `build(seed=0, **config)`, which makes a T5 of 2 + 2 layers."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return _builder(T5ForConditionalGeneration, T5Config, vocab_size=VOCAB_SIZE, **sizes, **special)


def _tokenizer():
    # Byte-level tokenizers write the bytes of space, newline and tab as these letters.
    characters = string.digits + string.ascii_letters + string.punctuation + "ĠĊĉ"
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        model_max_length=1024,
    )


@pytest.fixture
def tiny_tokenizer():
    """Return a tokenizer with one token for each printable ASCII character, newline and tab."""
    return _tokenizer()


@pytest.fixture
def tiny_model_dir(tmp_path, tiny_llama, tiny_tokenizer):
    """Return a directory with the tiny Llama and the tokenizer."""
    folder = tmp_path / "tiny_llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_name():
    """Return the `model.name` of the real SmolLM2-135M."""
    text = (ROOT / "configs" / "models" / "smollm2.yaml").read_text()
    return yaml.safe_load(text)["model"]["name"]


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_name):
    """Return a directory of the real SmolLM2-135M, which the cache keeps between runs."""
    return local_directory(resolve_model(smollm2_name))


SENTIMENT = (("bad", "poor", "dull", "cold"), ("good", "great", "fine", "warm"))


@pytest.fixture(scope="session")
def run_models(tmp_path_factory, tiny_llama, tiny_t5, tiny_gpt2):
    """Return a folder with `llama`, `t5` and `gpt2`, whose tokenizer has a token for each label."""
    models = {"llama": tiny_llama(), "t5": tiny_t5(), "gpt2": tiny_gpt2()}
    return _saved(models, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def wide_models(tmp_path_factory, tiny_llama, tiny_t5, tiny_gpt2):
    """Return `run_models` whose rows have 64 numbers or 128, whole blocks of a quantisation to four bits."""
    models = {
        "llama": tiny_llama(hidden_size=64, intermediate_size=128),
        "t5": tiny_t5(d_model=64, d_kv=32, d_ff=128),
        "gpt2": tiny_gpt2(n_embd=64),
    }
    return _saved(models, tmp_path_factory.mktemp("wide"))


def _saved(models, folder):
    tokenizer = _tokenizer()
    tokenizer.add_tokens([" negative", " positive"])
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def sst2_folder(tmp_path_factory):
    """Return a GLUE folder with 60 training rows and 20 published validation rows of SST-2."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for file, size in (("train", 60), ("dev", 20)):
        rows = [f"a {SENTIMENT[i % 2][i // 2 % 4]} film {file} {i}\t{i % 2}\n" for i in range(size)]
        (folder / "SST-2" / f"{file}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return folder


@pytest.fixture
def tiny_run(tmp_path, run_models, sst2_folder):
    """Return a complete configuration file: 3 steps of the tiny Llama below tmp_path / "runs"."""
    return write_tiny_run(
        tmp_path / "tiny.yaml", run_models / "llama", sst2_folder, tmp_path / "runs"
    )


@pytest.fixture
def command(monkeypatch):
    """Return `command(*argv)`, which runs `python train.py ARGV` in process and returns its status."""
    from app.cli.main import main  # 10 s of imports, which most tests do without

    # Pictures take most of the time of a tiny run.
    monkeypatch.setattr("callbacks.run_report.write_plots", lambda *_: [])
    monkeypatch.setattr("callbacks.alignment_monitor.write_heat_maps", lambda *_: [])
    return lambda *argv: main([str(argument) for argument in argv])


@pytest.fixture
def error_of(command, capsys):
    """Return `error_of(*argv, status=2)`: the error of a command line, told without a traceback."""

    def run(*argv, status=2):
        capsys.readouterr()
        assert command(*argv) == status
        told = capsys.readouterr().err
        assert "Traceback" not in told
        [line] = [line for line in told.splitlines() if line.startswith("error: ")]
        return told[told.index(line) :].removeprefix("error: ").strip()

    return run


@pytest.fixture
def parsed(monkeypatch, command):
    """Return `parsed(*argv, subcommand="fit")`: the configuration of a command line, which runs nothing."""
    from app.cli.lora_cli import LoraCLI

    class Parsed(Exception):
        pass

    def stop(cli):
        raise Parsed(cli.config)

    monkeypatch.setattr(LoraCLI, "instantiate_classes", stop)

    def parse(*argv, subcommand="fit"):
        with pytest.raises(Parsed) as parsed:
            command(subcommand, *argv)
        return parsed.value.args[0]

    return parse


@pytest.fixture
def fit(command, tiny_run, tmp_path):
    """Return `fit(*argv)`, which trains and returns the run's folder."""

    def run(*argv):
        assert command("fit", "--config", tiny_run, *argv) == 0
        return max((tmp_path / "runs" / "tiny").iterdir(), key=lambda path: int(path.name[8:]))

    return run


@pytest.fixture(scope="session")
def fitted(tmp_path_factory, run_models, sst2_folder):
    """Return `fitted(*argv)`, the folder of the tiny run with these options, which tests read only."""

    @functools.cache
    def run(*argv):
        from app.cli.main import main

        root = tmp_path_factory.mktemp("fitted")
        config = write_tiny_run(root / "tiny.yaml", run_models / "llama", sst2_folder, root)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("callbacks.run_report.write_plots", lambda *_: [])
            assert main(["fit", "--config", str(config), *argv]) == 0
        return root / "tiny" / "version_0"

    return run
