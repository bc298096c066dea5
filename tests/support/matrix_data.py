"""Files in the form of each data module and benchmark, and the section `data` that reads them."""

import csv
import json
from pathlib import Path
from typing import Any

from tests.support.lm_eval_tasks import NAMES, write_tasks

NUM_ROWS = 16
SIZES = {"batch_size": 4, "eval_batch_size": 4, "validation_size": 4, "max_length": 512}
PROGRAM = "```python\ndef f(x):\n    return x\n```"
OPTION = "Is {i} true?\n\nAnswer format: true/false"
ROWS = {
    "Gsm8kDataModule": {"question": "What is {i} + 1?", "answer": "One more.\n#### {i}"},
    "MetaMathQADataModule": {"query": "What is {i}?", "response": "It is {i}.", "type": "GSM_SV"},
    "CodeFeedbackDataModule": {"query": "Write f{i}.", "answer": PROGRAM},
    "InstructionDataModule": {"instruction": "Add {i}.", "input": "", "output": "one more"},
    "CommonsenseDataModule": {
        "instruction": OPTION,
        "input": "",
        "output": "the correct answer is true",
    },
}
"""The row of each source of free answers, for a number i."""
CHOICE = ["1 + {i}?", "1", "2", "3", "4", "B"]
PROBLEM = {
    "task_id": "HumanEval/{i}",
    "prompt": 'def f(x):\n    """Return x."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


def rows_of(row: Any, number: int = NUM_ROWS) -> list[Any]:
    """Write the numbers 0, 1, ... into a row."""
    return [json.loads(json.dumps(row).replace("{i}", str(i))) for i in range(number)]


def _section(name: str, path: Path | str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": {**SIZES, "path": str(path), **options}}


def _json_file(folder: Path, row: dict[str, Any], name: str = "rows.json") -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows_of(row)))
    return str(file)


def glue(folder: Path) -> dict[str, Any]:
    """Write SST-2."""
    (folder / "SST-2").mkdir()
    for name in ("train", "dev"):
        lines = [f"a {('bad', 'good')[i % 2]} film {name} {i}\t{i % 2}\n" for i in range(NUM_ROWS)]
        (folder / "SST-2" / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    return _section("GlueDataModule", folder, task="sst2")


def movie_reviews(folder: Path) -> dict[str, Any]:
    """Write rated sentences."""
    lines = [f"{i}\t{i % 2 * 2 - 1}\tSentence {i}." for i in range(2 * NUM_ROWS)]
    (folder / "reviews.txt").write_text("\r\n".join(lines))
    return _section("MovieReviewsDataModule", folder / "reviews.txt", test_size=5)


def free_answers(name: str, folder: Path) -> dict[str, Any]:
    """Write the rows of a source of free answers; of GSM8K, none is tested."""
    test_size = 0 if name == "Gsm8kDataModule" else 3
    return _section(name, _json_file(folder, ROWS[name]), test_size=test_size)


def benchmark(name: str, folder: Path) -> dict[str, Any]:
    """Write the questions of a benchmark; return its entry in `evals`."""
    arguments: dict[str, Any] = {"validation_size": 2, "limit": 3}
    if name == "Mmlu":
        for split, number in (("dev", 5), ("test", NUM_ROWS)):
            (folder / split).mkdir()
            with (folder / split / f"anatomy_{split}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows(rows_of(CHOICE, number))
        arguments |= {"path": str(folder), "subjects": ["anatomy"]}
    elif name == "LmEval":
        options = {"tasks": NAMES[:1], "include_path": str(write_tasks(folder))}
        return {"class_path": name, "init_args": {**arguments, **options}}
    elif name == "Commonsense":
        row = {"instruction": OPTION, "input": "", "answer": "true"}
        _json_file(folder, row, "boolq/test.json")
        arguments |= {"path": str(folder), "task": "boolq", "max_new_tokens": 2}
    else:
        row = PROBLEM if name == "HumanEval" else ROWS["Gsm8kDataModule"]
        arguments |= {"path": _json_file(folder, row), "max_new_tokens": 2}
    if name == "HumanEval":
        arguments["allow_code_execution"] = True
    return {"class_path": name, "init_args": arguments}


def benchmark_data(name: str, folder: Path) -> dict[str, Any]:
    """Write the questions of a benchmark; return the section `data` that asks nothing else."""
    arguments = {"evals": [benchmark(name, folder)], "eval_batch_size": 4}
    return {"class_path": "BenchmarkDataModule", "init_args": arguments}


def table(folder: Path) -> dict[str, Any]:
    """Write a labelled text a line."""
    file = folder / "rows.csv"
    lines = [f"film {i},{('negative', 'positive')[i % 2]}\n" for i in range(NUM_ROWS)]
    file.write_text("text,label\n" + "".join(lines))
    return _section("TableDataModule", file, test_size=4)


def chat(folder: Path) -> dict[str, Any]:
    """Write conversations of two questions and answers."""
    ask, say = ({"role": role, "content": "It is {i}."} for role in ("user", "assistant"))
    file = _json_file(folder, {"messages": [ask, say, ask, say]})
    return _section("ChatDataModule", file, test_size=3)


def with_evals(folder: Path) -> dict[str, Any]:
    """Write GSM8K's rows, and its benchmark's."""
    (folder / "evals").mkdir()
    section = free_answers("Gsm8kDataModule", folder)
    section["init_args"]["evals"] = [benchmark("Gsm8k", folder / "evals")]
    return section


def with_chat_template(folder: Path) -> dict[str, Any]:
    """Write instructions for the model's chat template."""
    section = free_answers("InstructionDataModule", folder)
    section["init_args"]["chat_template"] = True
    return section


def with_free_answers(name: str, folder: Path) -> dict[str, Any]:
    """Write the rows of a source, of which some are answered freely."""
    section = DATA[name](folder)
    asked = {"validation_size": 2, "limit": 3, "max_new_tokens": 2}
    section["init_args"]["evals"] = [{"class_path": "FreeAnswers", "init_args": asked}]
    return section


DATA = {
    "GlueDataModule": glue,
    "MovieReviewsDataModule": movie_reviews,
    **{name: lambda folder, name=name: free_answers(name, folder) for name in ROWS},
    "Gsm8kDataModule with evals": with_evals,
    "InstructionDataModule with chat_template": with_chat_template,
    "TableDataModule": table,
    "ChatDataModule": chat,
    **{
        f"{name} with FreeAnswers": lambda folder, name=name: with_free_answers(name, folder)
        for name in ("InstructionDataModule", "ChatDataModule")
    },
}
"""Writes the files of each data module that has rows; returns the section `data` that reads them."""
BENCHMARKS = ("Commonsense", "Gsm8k", "Gsm8kCot", "HumanEval", "LmEval", "Mmlu")
