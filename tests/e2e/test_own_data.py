"""A table and conversations of one's own on the real SmolLM2-135M: shown, learnt and scored."""

import csv
import json
import re

import pytest
from safetensors.torch import load_file

from app.cli.main import main
from tests.support.paths import DATA, needs_data

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
SHORT = ("--trainer.max_steps=2", "--output.wandb=disabled", "--data.eval_batch_size=8")
SHORT += ("--init.num_samples=8", "--init.micro_batch_size=4", "--data.batch_size=4")


def made(root, name, *options):
    """Run `python train.py fit` and return the run's folder and its scores."""
    assert main(["fit", f"--config={name}.yaml", f"--output.root={root}", *SHORT, *options]) == 0
    folder = max((root / name).iterdir(), key=lambda path: int(path.name[8:]))
    return folder, json.loads((folder / "summary.json").read_text())["metrics"]


@needs_data("glue")
def test_a_csv_of_sentences(tmp_path, monkeypatch, capsys):
    """Forty real sentences with the labels of a file, one of which has a comma, in quotes."""
    monkeypatch.chdir(tmp_path)
    lines = (DATA / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:57]
    rows = [line.split("\t") for line in lines]
    assert any("," in sentence for sentence, _ in rows)
    with open("films.csv", "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([["text", "label"], *rows])
    words = '--data.label_words={"0": "negative", "1": "positive"}'
    options = ("--data.path=films.csv", words, "--data.validation_size=8", "--data.test_size=8")
    assert main(["plan", "--config=table.yaml", *SHORT, *options]) == 0
    printed = capsys.readouterr().out
    assert "train rows                                  40" in printed
    assert len(re.findall(r"\| result:>>> (?:positive|negative)<\|im_end\|><<<", printed)) == 3
    _, scores = made(tmp_path, "table", *options, "--init.gamma=128")
    assert scores["after_init"]["loss"] < scores["zero_shot"]["loss"] / 2
    assert scores["final"]["loss"] < scores["zero_shot"]["loss"]
    assert scores["final"]["accuracy"] * 8 in range(9)


def test_conversations_of_two_questions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = ("Certainly: it is blue.", "No, it is not.", "Ask me tomorrow.")
    with open("talks.jsonl", "w") as stream:
        for i in range(32):
            talk = []
            for turn in range(2):
                talk.append({"role": "user", "content": f"Question {2 * i + turn}?"})
                talk.append({"role": "assistant", "content": answers[(i + turn) % 3]})
            stream.write(json.dumps({"messages": talk}) + "\n")
    options = ("--data.path=talks.jsonl", "--data.validation_size=4", "--init.num_samples=4")
    assert main(["plan", "--config=chat.yaml", *SHORT, *options]) == 0
    printed = capsys.readouterr().out
    shown = re.findall(r"^     \| >>>(.*)<\|im_end\|><<<$", printed, re.MULTILINE)
    assert len(shown) == 6, "two answers of each of three conversations"
    assert set(shown) <= set(answers)
    folder, scores = made(tmp_path, "chat", *options)
    assert scores["final"]["loss"] < scores["zero_shot"]["loss"]
    adapter = folder / "adapter" / "adapter_model.safetensors"
    assert all(bool(factor.isfinite().all()) for factor in load_file(adapter).values())
