"""`plan` end to end: what it prints and refuses, for every data module."""

import json
import shutil

import pytest
import yaml
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.support.matrix import CHAT_TEMPLATE
from tests.support.matrix_data import ROWS, chat, rows_of


@pytest.fixture
def plan(command, tiny_run, capsys, monkeypatch, tmp_path):
    """Return `plan(*argv, status=0)`: what it prints; no weights are loaded and no run folder appears."""

    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("app.training.model_building.load_model", load)

    def run(*argv, status=0):
        capsys.readouterr()
        assert command("plan", "--config", tiny_run, *argv) == status
        assert not (tmp_path / "runs").exists()
        printed = capsys.readouterr()
        return printed.err if status == 2 else printed.out

    return run


def test_the_command(plan):
    printed = plan()
    assert "train rows                                  40" in printed
    assert "8 x 1 processes x 1 accumulated" in printed
    assert "optimizer steps                              3   5 an epoch" in printed
    assert "result:>>> positive<eos><<<" in printed
    assert printed.count("tokens read, 2 supervised") == 3
    assert "rank 4 in 14 layers" in printed
    assert "initialization (sketch)" in printed
    assert "\nfits: " in printed
    assert "memory of each process (one process)" in printed


def test_packed_rows(plan, run_models):
    """40 rows of 62 to 67 tokens, three in a row of 201."""
    packed = "--data.packing=true", "--data.max_length=201", "--data.batch_size=4"
    printed = plan(*packed)
    assert "packed rows                                 14   of 201 tokens, 94% filled" in printed
    assert "optimizer steps                              3   4 an epoch" in printed
    assert printed.count("tokens read, 2 supervised") == 3
    told = plan(*packed, "--model.name", run_models / "t5", status=2)
    assert "--data.packing=true, but model.name=" in told
    assert "is a sequence-to-sequence model" in told


def test_the_longest_rows_are_measured_whatever_the_order(plan):
    def activations(*options):
        [line] = [line for line in plan(*options).splitlines() if "kept for backward" in line]
        return line

    grouped, shuffled = (
        activations(f"--data.length_grouping={value}", "--data.batch_size=1")
        for value in ("true", "false")
    )
    assert grouped == shuffled


def test_the_command_on_t5_without_initialization(plan, run_models):
    printed = plan("--model.name", run_models / "t5", "--config", "methods/lora.yaml")
    assert ">>>positive<eos><<<" in printed or ">>> positive<eos><<<" in printed
    assert "initialization" not in printed


def data_file(folder, name, **arguments):
    """Write a configuration of a data module that reads the file `rows`."""
    arguments["path"] = str(folder / "rows")
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"data": {"class_path": name, "init_args": arguments}}))
    return file


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_the_tokenizer_chooses(name, plan, tmp_path):
    """Sources of free answers keep rows by their tokens, so that their rows need the tokenizer."""
    (tmp_path / "rows").write_text(json.dumps(rows_of(ROWS[name], 20)))
    printed = plan("--config", data_file(tmp_path, name, max_length=512, validation_size=4))
    assert "train rows                                  16" in printed
    assert "validation rows                              4" in printed
    assert printed.count("tokens read, ") == 3
    assert "initialization (sketch)" in printed
    assert "\nfits: " in printed


def test_every_answer_of_a_conversation_is_marked(plan, run_models, tmp_path):
    model = shutil.copytree(run_models / "llama", tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump({"data": chat(tmp_path)}))
    printed = plan("--config", file, "--model.name", model, "--init.num_samples=4")
    turn = "user: It is {i}.<eos>assistant: >>>It is {i}.<eos><<<"
    assert 2 * turn.format(i=2) in printed
    assert printed.count("supervised [") == 3


def test_rows_of_movie_reviews(plan, tmp_path):
    lines = [f"{i}\t{i % 2 * 2 - 1}\tSentence {i}." for i in range(28)]
    (tmp_path / "rows").write_text("\r\n".join(lines))
    data = data_file(tmp_path, "MovieReviewsDataModule", validation_size=3, test_size=5)
    assert "train rows                                  20" in plan("--config", data)


def test_classes_of_a_table_and_their_training_rows(plan, run_models, tmp_path):
    """The most frequent first, ten at most; rows that validate are not counted."""

    def classes(labels, **arguments):
        lines = "".join(f"film {i},{label}\n" for i, label in enumerate(labels))
        (tmp_path / "rows.csv").write_text("text,label\n" + lines)
        arguments["path"] = str(tmp_path / "rows.csv")
        section = {"class_path": "TableDataModule", "init_args": arguments}
        file = tmp_path / "data.yaml"
        file.write_text(yaml.safe_dump({"data": section}))
        # A token is a letter: that of the label comes first in T5's answer, behind a space in Llama's.
        printed = plan("--config", file, "--model.name", run_models / "t5")
        [line] = [line for line in printed.splitlines() if line.startswith("  classes ")]
        return " ".join(line.split()[1:])

    (tmp_path / "other.csv").write_text("text,label\nnew,bad\n")
    held_out = {"validation_file": str(tmp_path / "other.csv"), "validation_size": None}
    few = ["bad"] * 6 + ["good"] * 13 + ["okay"]
    assert classes(few, **held_out) == "3 good 13, bad 6, okay 1"
    ten = "a 3, b 2, c 2, d 2, e 2, f 2, g 2, h 2, i 2, j 2"
    assert classes("abcdefghij" * 2 + "a", validation_size=0) == f"10 {ten}"
    assert classes("abcdefghij" * 2 + "ak", validation_size=0) == f"11 {ten}, ..."


def test_benchmarks_are_planned_for(plan):
    """Their questions are cut or refused by the model's context, as by `fit`."""
    writing = "{class_path: tests.support.toy_benchmarks.Writing, init_args: {max_new_tokens: %d}}"
    printed = plan(f"--data.evals=[{writing % 6}]")
    assert "writing                           23 questions   longest" in printed
    assert "up to 6 new" in printed
    assert "keys and values of the largest batch" in printed
    printed = plan(f"--data.evals=[{writing % 2000}]", status=2)
    assert "max_new_tokens=2000 of writing fill the model's context" in printed


def test_a_cluster_from_a_laptop(plan):
    options = ("--trainer.accelerator=gpu", "--trainer.devices=4", "--trainer.num_nodes=2")
    printed = plan(*options, "--config=strategies/fsdp.yaml", "--memory_gib=1")
    assert "memory of each process (Fsdp2Strategy, 8 processes)" in printed
    assert "8 x 8 processes x 1 accumulated" in printed
    assert "of 1.0 GiB (--memory_gib)" in printed
    printed = plan(*options, "--config=strategies/fsdp.yaml", "--memory_gib=1e-4", status=1)
    assert "does not fit: " in printed
    assert "lower data.batch_size" in printed


def test_cut_prompts_and_accumulation_are_printed(plan):
    printed = plan("--data.max_length=100", "--trainer.accumulate_grad_batches=2")
    assert "0 prompts cut to data.max_length=100" in printed
    assert "rows an optimizer step                      16" in printed
    with pytest.warns(UserWarning, match="were cut"):
        assert "40 prompts cut to data.max_length=50" in plan("--data.max_length=50")


def test_weights_need_not_be_there(plan, run_models, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run_models / "llama", bare)
    (bare / "model.safetensors").unlink()
    assert "\nfits: " in plan("--model.name", bare)
    (bare / "tokenizer.json").unlink()
    assert "lacks: a tokenizer" in plan("--model.name", bare, status=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.adapter.r=17",), "set model.adapter.r to at most 16"),
        (("--model.adapter.target_modules=[quary]",), "which fits no layer of this model"),
        (("--data.bath_size=2",), "did you mean data.batch_size?"),
        (("--data.path=nowhere",), "nowhere"),
        (("--init.num_samples=1000",), "expected 1 to 40"),
        (("--config=quickstrat.yaml",), "did you mean quickstart.yaml?"),
        (("--memory_gib=0",), "--memory_gib is 0.0: expected more than 0"),
        (("--trainer.accelerator=tpu",), "say so with --memory_gib"),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=-1"), "has no end: set one of them"),
        (("--trainer.precision=7",), "trainer"),
        (
            ("--config=methods/full.yaml", "--config=strategies/fsdp.yaml"),
            "shards frozen weights only",
        ),
        (("--model.adapter=null", "--init=null"), "PreconditionedAdamW, which works on LoRA pairs"),
        (("--model.adapter=null",), "the model has no LoRA adapter"),
        (("--data=BenchmarkDataModule",), "has no rows to train on"),
        (
            ("--model.adapter.use_dora=true", "--config=strategies/fsdp.yaml"),
            "has use_dora, which does not work with the sharded weights",
        ),
    ],
)
def test_errors_are_one_line(options, message, plan):
    printed = plan(*options, status=2)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in printed


def test_print_config_and_help(command, tiny_run, capsys):
    for option, text in (
        ("--print_config", "memory_gib: null"),
        ("--help", "Memory of one device"),
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            command("plan", "--config", tiny_run, option)
        assert text in capsys.readouterr().out


@pytest.mark.slow
def test_layers_of_seventy_billion_parameters(plan, run_models, tmp_path):
    """Eight of the eighty, which all take the same time: 8 (144 + 16 + 672) 2^20 and norms, and embeddings."""
    big = tmp_path / "big"
    big.mkdir()
    PreTrainedTokenizerFast.from_pretrained(run_models / "llama").save_pretrained(big)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=8,
        num_attention_heads=64,
        num_key_value_heads=8,
    ).save_pretrained(big)
    assert "dtype" not in json.loads((big / "config.json").read_text())
    options = ("--model.name", big, "--model.dtype=bfloat16", "--model.adapter.r=8")
    printed = plan(
        *options,
        *("--model.gradient_checkpointing=true", "--config=strategies/fsdp.yaml"),
        *("--trainer.accelerator=gpu", "--trainer.devices=8", "--memory_gib=80"),
        *("--config=methods/lora.yaml", "--data.validation_size=0"),
    )
    assert "7,369,531,392   bfloat16" in printed
    assert "frozen weights                         1.7 GiB   1/8 of them" in printed
    assert "host memory while loading             13.7 GiB   in the first process" in printed
    assert "trained parameters                  10,354,688" in printed
    assert "\nfits: " in printed


@pytest.mark.parametrize(
    ("config", "kind", "shown"),
    [
        # PEFT's comparison learns all tokens of a row but the first.
        ("peft_benchmark_llama32_3b", "MetaMathQADataModule", "1. 1 tokens read, "),
        ("commonsense_llama2_7b", "CommonsenseDataModule", ">>>the correct answer is true<eos><<<"),
    ],
)
def test_runs_of_published_comparisons(config, kind, shown, command, run_models, tmp_path, capsys):
    """With a model and rows that are here in the place of theirs."""
    file, questions = tmp_path / "rows.json", tmp_path / "test.json"
    file.write_text(json.dumps(rows_of(ROWS[kind], 4300)))
    questions.write_text(json.dumps(rows_of(ROWS["Gsm8kDataModule"])))
    here = [f"--model.name={run_models / 'llama'}", f"--data.path={file}", "--model.adapter.r=4"]
    here += [f"--data.evals.path={questions}"] if config.startswith("peft") else []
    assert command("plan", "--config", config, *here) == 0
    assert shown in capsys.readouterr().out
