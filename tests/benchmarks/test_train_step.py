"""The parts of the training step's benchmark: the sample, turns, the table, and the products of a step."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import train_step
from benchmarks.parts import our_step
from benchmarks.parts.limit import Products, operations, time_products
from benchmarks.peers import trainer
from benchmarks.peers.turns import Turns, read_rows
from data_modules.gsm8k import Gsm8kDataModule


@pytest.fixture
def tiny_task(tmp_path, run_models, tiny_tokenizer, monkeypatch):
    """Write a task of two steps of two rows for a tiny Llama; return its size."""
    data = tmp_path / "train.jsonl"
    rows = [{"question": "How many? " * (i + 1), "answer": f"{i} #### {i}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = Gsm8kDataModule(str(data), validation_size=0, batch_size=2)
    monkeypatch.setattr(train_step, "task_data", lambda *_: module)
    args = Namespace(data=data, steps=2, threads=1, model=run_models / "llama")
    return train_step.write_task("gsm8k", args, tmp_path, tiny_tokenizer)


def test_both_orders_have_the_same_rows(tiny_task, tmp_path):
    tasks = [read_rows(tmp_path / f"gsm8k_{order}.json") for order in ("grouped", "plain")]
    (grouped, rows), (plain, shuffled) = tasks
    assert rows != shuffled
    assert [rows[i] for i in grouped["check"]] == [shuffled[i] for i in plain["check"]] == rows[:2]
    assert sorted(map(str, rows)) == sorted(map(str, shuffled))
    epoch = tiny_task
    assert (epoch["steps"], epoch["rows"]) == (2, 4)
    assert epoch["tokens"] == sum(len(row["labels"]) for row in rows)
    assert epoch["supervised"] == sum(label >= 0 for row in rows for label in row["labels"])


@pytest.mark.slow
def test_our_step_is_profiled(tiny_task, tmp_path, monkeypatch, capfd):
    task = tmp_path / "gsm8k_grouped.json"
    monkeypatch.setattr("sys.argv", ["our_step", "lora", str(task), "--profile"])
    assert our_step.train(our_step.arguments("lora", task)) == 0
    told = capfd.readouterr().out
    assert "aten::mm" in told
    assert "the pass takes" in told


class Done(BaseException):
    """The turns that a test wants have been taken."""


@pytest.mark.parametrize(
    "contender",
    [
        "lora",
        "trainer",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("preconditioned", "packed")),
    ],
)
def test_a_contender_trains_an_epoch_a_turn(contender, tiny_task, tmp_path, monkeypatch):
    told, trained = [], []

    class TwoTurns(Turns):
        def __init__(self):
            self._line = None

        def loaded(self, model):
            trained.extend(p for p in model.parameters() if p.requires_grad)
            told.append(len(trained))

        def ready(self, first_pass):
            told.append(float(first_pass()))
            self.first_pass = first_pass

        def begin(self):
            assert float(self.first_pass()) < told[1] or len(told) == 2
            assert all(p.grad is None for p in trained)
            told.append([p.detach().clone() for p in trained])
            if len(told) == 5:
                raise Done

        def end(self):
            pass

    monkeypatch.setattr(our_step, "Turns", TwoTurns)
    monkeypatch.setattr(trainer, "Turns", TwoTurns)
    run, given = trainer.main, ("trainer", tmp_path / "gsm8k_plain.json")
    if contender != "trainer":
        run, given = (
            our_step.train,
            (our_step.arguments(contender, tmp_path / "gsm8k_grouped.json"),),
        )
    with pytest.raises(Done):
        run(*given)
    factors, loss, *weights = told
    assert factors == 28  # A and B of seven linear layers in each of two blocks
    settings, rows = read_rows(tmp_path / "gsm8k_plain.json")
    assert loss == pytest.approx(
        token_mean([rows[i] for i in settings["check"]], settings), abs=1e-5
    )
    first, second, third = (torch.cat([w.flatten() for w in each]) for each in weights)
    # AdamW at a constant rate of 1e-4 moves a weight by as much in its first step.
    assert 0.9e-4 < (second - first).abs().max() < 3e-4
    assert (third - second).abs().max() > 1e-5


def token_mean(rows, settings):
    """Return the loss of rows, each by itself, in the model as it was loaded."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"])
    total, tokens = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels >= 0).sum())
    return total / tokens


def test_the_sample_has_batches_of_neighbours_at_even_quantiles():
    lengths = [(7 * i) % 100 + 1 for i in range(100)]  # 1 to 100, shuffled
    sample = [lengths[i] for i in train_step.stratified(lengths, 5, 4)]
    assert [sample[i : i + 4] for i in range(0, 20, 4)] == [
        [92, 91, 90, 89],
        [72, 71, 70, 69],
        [52, 51, 50, 49],
        [32, 31, 30, 29],
        [12, 11, 10, 9],
    ]
    assert sorted(train_step.stratified(lengths, 25, 4)) == list(range(100))
    with pytest.raises(SystemExit, match="--steps=26 of 4 rows each, of 100 rows"):
        train_step.stratified(lengths, 26, 4)


def test_labels_of_a_task_are_the_answers(tmp_path):
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"rows": [[[5, 6, 7], [8, 9]]], "r": 8}))
    settings, rows = read_rows(file)
    assert settings == {"r": 8}
    assert rows == [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]


def test_a_process_trains_when_it_is_told_to(tmp_path):
    program = """
import torch
from types import SimpleNamespace
from benchmarks.peers.turns import Turns
turns = Turns()
print("what a library prints")
factors, frozen = torch.ones(8, requires_grad=True), torch.ones(8)
turns.loaded(SimpleNamespace(parameters=lambda: [factors, frozen]))
turns.ready(lambda: print("passes") or 1.25)
for epoch in range(10):
    turns.begin()
    print("trains", epoch)
    kept = bytearray(40 * 2**20 // (epoch + 1))
    turns.end()
    del kept
"""
    log = tmp_path / "log"
    process = train_step.Process("fake", [sys.executable, "-uc", program], log, 1)
    rounds = [process.turn() for _ in range(2)]
    process.close()
    assert (process.ready["loss"], process.ready["trained_bytes"]) == (1.25, 32)
    assert process.process.returncode == 0
    assert log.read_text() == "what a library prints\npasses\npasses\ntrains 0\npasses\ntrains 1\n"
    for number, each in enumerate(rounds):
        assert each["excess_mib"] == pytest.approx(each["peak_mib"] - process.ready["loaded_mib"])
        assert abs(each["excess_mib"] - 40 / (number + 1)) < 15
        assert each["cpu_seconds"] > 0
        assert 0 < each["seconds"] < 60


def test_a_process_that_fails_ends_the_benchmark(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(SystemExit, match="fake ended before its turn:\nno such model"):
        train_step.Process("fake", command, tmp_path / "log", 1)


@pytest.mark.parametrize(("loss", "trained"), [(2.5002, 64), (2.5, 32)])
def test_contenders_that_do_other_work_end_the_benchmark(loss, trained):
    ours = {"loss": 2.5, "trained_bytes": 64}
    train_step.check_same({"ours": ours, "trl": {**ours, "loss": 2.50009}})
    with pytest.raises(SystemExit, match="times mean nothing: ours"):
        train_step.check_same({"ours": ours, "trl": {"loss": loss, "trained_bytes": trained}})


def test_ratios_are_taken_within_a_round(capsys):
    def rounds(*seconds, peak):
        keys = ("seconds", "cpu_seconds", "peak_mib", "excess_mib")
        return [dict(zip(keys, (s, s / 2, peak, peak - 500), strict=True)) for s in seconds]

    measured = {"ours": rounds(1, 10, 2, peak=1500), "trl": rounds(2, 15, 8, peak=2500)}
    epoch = {"steps": 2, "rows": 8, "tokens": 100, "supervised": 16}
    figures = train_step.report("reviews", epoch, measured)
    assert figures == {"reviews, trl / ours, time": 2.0, "reviews, ours / trl, peak": 0.6}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| TRL")]
    cells = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert cells[1:4] == ["4.00", "1.00", "2.0"]  # seconds a step, samples/s, supervised tokens/s
    assert cells[4:6] == ["2.00 (1.50 to 4.00)", "2.00 (1.50 to 4.00)"]
    assert cells[6:] == ["2500", "2000", "0.60", "0.50"]


def test_products_of_a_pass_are_counted_with_their_operations():
    layer, x = nn.Linear(16, 32), torch.randn(5, 16, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 6, 4, requires_grad=True).unbind()
    with Products() as products:
        layer(x).sum().backward()
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    counted = sum(operations(func, args) * n for (func, args, _), n in products.calls.items())
    linear = 3 * 2 * 5 * 16 * 32  # the output, the gradients of x and of the weight
    assert counted == linear + (4 + 10) * 2 * 6 * 6 * 4
    assert time_products(products.calls) > 0
