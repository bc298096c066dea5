"""The parts of the training step's benchmark: the sample, turns, the table, and the products of a step."""

import json
import re
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.parts import our_step
from benchmarks.parts.limit import Products, operations, time_products
from benchmarks.peers.turns import read_rows
from data_modules.gsm8k import Gsm8kDataModule
from tests.support.paths import ROOT


@pytest.fixture
def tiny_task(tmp_path, run_models, tiny_tokenizer, monkeypatch):
    """Write a task of two steps of two rows for a tiny Llama; return what `measure` is given, and its size."""
    data = tmp_path / "train.jsonl"
    rows = [{"question": "How many? " * (i + 1), "answer": f"{i} #### {i}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = Gsm8kDataModule(str(data), validation_size=0, batch_size=2)
    monkeypatch.setattr(train_step, "task_data", lambda *_: module)
    args = Namespace(data=data, steps=2, threads=1, model=run_models / "llama", rounds=2)
    args.peers, args.contenders = sys.executable, ["ours", "trainer"]
    return args, train_step.write_task("gsm8k", args, tmp_path, tiny_tokenizer)


def test_both_orders_have_the_same_rows(tiny_task, tmp_path):
    tasks = [read_rows(tmp_path / f"gsm8k_{order}.json") for order in ("grouped", "plain")]
    (grouped, rows), (plain, shuffled) = tasks
    assert rows != shuffled
    assert [rows[i] for i in grouped["check"]] == [shuffled[i] for i in plain["check"]] == rows[:2]
    assert sorted(map(str, rows)) == sorted(map(str, shuffled))
    epoch = tiny_task[1]
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


@pytest.mark.slow
def test_contenders_take_turns_on_the_same_rows(tiny_task, tmp_path, capfd):
    args, epoch = tiny_task
    measured = train_step.measure("gsm8k", args, tmp_path)
    assert [len(rounds) for rounds in measured.values()] == [2, 2]
    assert set(train_step.report("gsm8k", epoch, measured)) == {
        "gsm8k, trainer / ours, time",
        "gsm8k, ours / trainer, peak",
    }
    told = capfd.readouterr()
    ours, theirs = re.search(r"ours ([\d.]+), trainer ([\d.]+)", told.err).groups()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
    assert "| Trainer + PEFT |" in told.out


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


def test_a_process_trains_when_it_is_told_to():
    program = """
from types import SimpleNamespace
from benchmarks.peers.turns import Turns
turns = Turns()
print("what a library prints")
turns.loaded(SimpleNamespace(parameters=list))
turns.ready(1.25)
for epoch in range(10):
    turns.begin()
    print("trains", epoch)
    kept = bytearray(40 * 2**20 // (epoch + 1))
    turns.end()
    del kept
"""
    here, there = socket.socketpair()
    with there:
        command = [sys.executable, "-uc", program]
        process = subprocess.Popen(
            command, stdin=there, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
    with here, here.makefile("rw") as line:
        ready = json.loads(line.readline())
        rounds = []
        for _ in range(2):
            print("go", file=line, flush=True)
            rounds.append(json.loads(line.readline()))
    assert ready["loss"] == 1.25
    assert process.communicate()[0] == "what a library prints\ntrains 0\ntrains 1\n"
    assert process.returncode == 0
    for number, each in enumerate(rounds):
        assert each["excess_mib"] == pytest.approx(each["peak_mib"] - ready["loaded_mib"])
        assert abs(each["excess_mib"] - 40 / (number + 1)) < 15
        assert each["cpu_seconds"] > 0
        assert 0 < each["seconds"] < 60


def test_losses_that_differ_end_the_benchmark(capsys):
    train_step.check_losses({"ours": 2.5, "trl": 2.50009})
    with pytest.raises(SystemExit, match="times mean nothing: ours"):
        train_step.check_losses({"ours": 2.5, "trl": 2.5002})


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
