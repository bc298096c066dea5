"""GSM8K: what is read in outputs, against a table by hand, all gold answers and lm-evaluation-harness."""

import gzip
import hashlib
import json
from fractions import Fraction

import pytest

from app.evaluation.benchmark import Question
from app.utils.errors import InputError
from data_modules.evals.gsm8k import Gsm8k, lora_one_number
from data_modules.evals.gsm8k_cot import Gsm8kCot
from data_modules.evals.number_answers import last_number, number_behind
from tests.oracles.gsm8k_table import all_cases
from tests.support.paths import DATA, ROOT, needs_data
from tests.support.rows import Hub, write_jsonl

ORACLES = ROOT / "tests" / "oracles"
REAL = DATA / "gsm8k"

CASES = all_cases(json.loads((ORACLES / "gsm8k_outputs.json").read_text()))
VERDICTS = json.loads((ORACLES / "gsm8k_verdicts.json").read_text())["verdicts"]
MARKERS = {"direct": "####", "cot": "The answer is"}
BENCHMARKS = {"direct": Gsm8k(), "cot": Gsm8kCot()}


def number(text):
    return None if text is None else Fraction(text.replace(",", ""))


def question(form, gold, answer="#### 0"):
    reference = {"number": number(gold), "lora_one": lora_one_number(answer)}
    return Question("gsm8k/0", "?", reference if form == "direct" else number(gold))


@pytest.mark.parametrize(("case", "theirs"), zip(CASES, VERDICTS, strict=True))
def test_reading(case, theirs):
    """Ours is what a person reads; lm-evaluation-harness agrees but where the table says why not."""
    assert theirs["gold"] == case.gold
    assert number_behind(case.output, MARKERS[case.form]) == number(case.strict)
    assert last_number(case.output) == number(case.flexible)
    scores = BENCHMARKS[case.form].score(question(case.form, case.gold), [case.output])
    assert scores["strict"] == (number(case.strict) == number(case.gold))
    assert scores["flexible"] == (number(case.flexible) == number(case.gold))
    ours = [scores["strict"], scores["flexible"]]
    agrees = ours == [theirs["strict-match"][1], theirs["flexible-extract"][1]]
    assert agrees == (not case.lm_eval)


@pytest.mark.parametrize(
    ("output", "read"),
    [("1 080", "80"), ("1.080.000", "0"), ("1.8e4", "4"), ("3 1/2", "1/2"), ("18 m2", "2")],
)
def test_what_is_not_read_as_a_person_does(output, read):
    """The limits that docs/evaluation.md admits."""
    assert last_number(output) == Fraction(read)


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("#### 18", 18),
        ("####18 apples", 18),
        ("####\n18", 18),
        ("#### 18\n#### 19", 18),
        ("#### 1,080", 1),
        ("#### -5", 0),
        ("#### $18", 0),
        ("18", 0),
    ],
)
def test_the_authors_reading(output, read):
    assert lora_one_number(output) == read


def test_a_run_of_digits_without_end_is_no_number():
    """A model that repeats itself must not stop the benchmark: int() refuses 5000 digits."""
    assert last_number("It is 18, or " + 5000 * "9") == 18
    assert number_behind("#### " + 5000 * "9", "####") is None
    assert lora_one_number("#### " + 5000 * "9") == 0


def test_the_authors_reading_misreads_both_sides():
    scored = Gsm8k().score(question("direct", "1080", "#### 1,080"), ["#### 1,999"])
    assert scored == {"strict": 0.0, "flexible": 0.0, "lora_one": 1.0}


def test_several_outputs_count_by_their_share():
    outputs = ["#### 18", "It is 18.", "#### 19", "#### 18.0"]
    scored = Gsm8k(temperature=0.8).score(question("direct", "18", "#### 18"), outputs)
    assert scored == {"strict": 0.5, "flexible": 0.75, "lora_one": 0.5}


@needs_data("gsm8k")
@pytest.mark.parametrize(
    ("file", "size", "misread"), [("test.jsonl", 923, 12), ("train.jsonl.gz", 7473, None)]
)
def test_all_gold_answers(file, size, misread):
    """A solution is its own best output; 11 thousands commas and a minus are misread by the authors'."""
    benchmark = Gsm8k(str(REAL / file))
    questions = benchmark.load()
    text = (REAL / file).read_bytes()
    lines = (gzip.decompress(text) if file.endswith(".gz") else text).decode().splitlines()
    assert len(questions) == len(lines) == size
    wrong = 0
    for asked, line in zip(questions, lines, strict=True):
        row = json.loads(line)
        official = int(row["answer"].split("#### ")[1].replace(",", ""))
        assert asked.reference["number"] == official
        assert asked.prompt == f"Q: {row['question']}\nA: "
        scored = benchmark.score(asked, [row["answer"]])
        assert scored == {"strict": 1, "flexible": 1, "lora_one": 1}
        wrong += asked.reference["lora_one"] != official
    assert misread in (wrong, None)
    assert [asked.key for asked in questions[:2]] == ["gsm8k/0", "gsm8k/1"]


@needs_data("gsm8k")
def test_prompts_after_examples_are_those_of_lm_eval():
    oracle = json.loads((ORACLES / "prompts.json").read_text())
    benchmark = Gsm8kCot(str(REAL / "test.jsonl"))
    prompts = [asked.prompt for asked in benchmark.load()]
    assert prompts[0] == oracle["prompts"]["gsm8k_cot/0"]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    assert [len(prompts), digest] == oracle["sha256"]["gsm8k_cot"]
    assert list(benchmark.decoding.stop) == oracle["gsm8k_cot_until"]
    assert benchmark.decoding.temperature == 0
    assert benchmark.score_names([]) == ["strict", "flexible"]


def test_settings():
    benchmark = Gsm8k(max_new_tokens=7, temperature=0.8, top_p=0.95, limit=3)
    decoding = benchmark.decoding
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p) == (7, 0.8, 0.95)
    assert (benchmark.limit, benchmark.validation_size) == (3, 100)
    scored = benchmark.score(question("direct", "1"), [""])
    assert benchmark.score_names([]) == list(scored)


ROW = {"question": "Why?", "answer": "So.\n#### 3"}


def test_gold_is_behind_the_last_marker(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", {**ROW, "answer": "#### 1\n#### 1,003 "})
    assert Gsm8k(path).load()[0].reference == {"number": 1003, "lora_one": 1}
    assert Gsm8kCot(path).load()[0].reference == 1003


@pytest.mark.parametrize("benchmark", [Gsm8k, Gsm8kCot])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "Why?"}, "line 2 of .* has question: expected the fields question, answer"),
        ({**ROW, "answer": "3"}, "line 2 of .* without a number behind '####'"),
        ({**ROW, "answer": "#### x"}, "without a number"),
    ],
)
def test_bad_rows(tmp_path, benchmark, bad, message):
    with pytest.raises(InputError, match=message) as caught:
        benchmark(write_jsonl(tmp_path / "test.jsonl", ROW, bad)).load()
    assert f"change path of the benchmark {benchmark.name}" in str(caught.value)


def test_the_hub(monkeypatch):
    hub = Hub(monkeypatch, test=[ROW])
    [asked] = Gsm8k().load()
    assert hub.asked == [("openai/gsm8k", "main", "test")]
    assert (asked.prompt, asked.reference["number"]) == ("Q: Why?\nA: ", 3)


def test_pefts_form(tmp_path):
    """Its prompt, and the number behind "The answer is:"; the authors' reading is of the other form alone."""
    path = write_jsonl(tmp_path / "test.jsonl", ROW)
    benchmark = Gsm8k(path, prompt="peft")
    [asked] = benchmark.load()
    assert asked.prompt == "Question: Why? Think step by step.\nAnswer:"
    assert benchmark.decoding.stop[0] == "Question:"
    outputs = [" 1 + 2 = 3.\nThe answer is: 3", " #### 3", " The answer is: 4"]
    assert benchmark.score(asked, outputs) == pytest.approx({"strict": 1 / 3, "flexible": 2 / 3})
    assert benchmark.score_names([asked]) == ["strict", "flexible"]
