"""Questions of a benchmark among the training rows: real files, and the forms of their prompts."""

import json

import pytest

from data_modules.commonsense import CommonsenseDataModule
from data_modules.contamination import question_text, shared_questions
from data_modules.evals.commonsense import Commonsense
from data_modules.evals.gsm8k import Gsm8k
from data_modules.evals.gsm8k_cot import Gsm8kCot
from data_modules.evals.humaneval import LORA_ONE_PROMPT
from data_modules.evals.mmlu import Mmlu
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.instructions import InstructionDataModule, instruction_prompt
from data_modules.metamath import MetaMathQADataModule
from tests.support.paths import DATA, needs_data
from tests.support.rows import attached

GSM8K_TEST = str(DATA / "gsm8k" / "test.jsonl")
ADAPTERS = DATA / "math" / "llm_adapters_math_data.json"


def prompts(data):
    return [prompt for prompt, _ in data.examples()]


def asked(benchmark):
    return [question.prompt for question in benchmark.load()]


@pytest.fixture(scope="module")
def contaminated(tmp_path_factory):
    """The file as published has GSM8K's test questions; here 300 of them, in another case and spacing."""
    rows = json.loads(ADAPTERS.read_bytes())
    for line in (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
        question = json.loads(line)["question"].lower().replace(". ", ".  ") + " "
        rows.append({"instruction": question, "input": "", "output": "\nA: 1", "answer": "1"})
    file = tmp_path_factory.mktemp("data") / "math.json"
    file.write_text(json.dumps(rows))
    return str(file)


@needs_data("gsm8k", "math")
@pytest.mark.parametrize("kind", [Gsm8k, Gsm8kCot])
def test_gsm8k_in_the_arithmetic_of_llm_adapters(kind, contaminated):
    """Whether GSM8K is asked directly or behind eight worked examples."""
    questions = asked(kind(GSM8K_TEST))
    assert shared_questions(prompts(InstructionDataModule(str(ADAPTERS))), questions) == 0
    assert shared_questions(prompts(InstructionDataModule(contaminated)), questions) == 300


@pytest.mark.slow
@needs_data("gsm8k", "math")
def test_fitting_warns_of_them(contaminated, tiny_tokenizer):
    """All of the benchmark's questions count, though few of them are asked while training."""
    benchmark = Gsm8k(GSM8K_TEST, validation_size=2)
    data = attached(InstructionDataModule, tiny_tokenizer, path=contaminated, evals=[benchmark])
    with pytest.warns(UserWarning, match=r"training rows of .* are questions of gsm8k, word for"):
        data.setup("fit")
    shared = shared_questions((row.prompt for row in data.rows("train")), asked(benchmark))
    assert data.describe()["shared_questions"] == {"gsm8k": shared}
    assert shared >= 299  # one row may validate


@needs_data("gsm8k", "commonsense")
def test_clean_files_are_clean():
    train = prompts(Gsm8kDataModule(str(DATA / "gsm8k" / "train.jsonl.gz")))
    assert shared_questions(train, asked(Gsm8k(GSM8K_TEST))) == 0
    file = DATA / "commonsense" / "commonsense_train_2k.json"
    known = prompts(CommonsenseDataModule(str(file)))
    sets = ["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"]
    assert shared_questions(known, asked(Commonsense(str(DATA / "commonsense"), sets))) == 0
    assert shared_questions(known, known) == 2000


@needs_data("gsm8k", "math")
def test_metamath_repeats_questions_of_gsm8k_train():
    """Of five rows one is the question itself; two are rephrased, two ask for an unknown x."""
    rows = prompts(MetaMathQADataModule(str(DATA / "math" / "metamathqa_quoted_rows.json")))
    train = prompts(Gsm8kDataModule(str(DATA / "gsm8k" / "train.jsonl.gz")))
    assert (len(rows), shared_questions(rows, train)) == (5, 1)


def test_every_row_counts():
    assert shared_questions(["Q: one?\nA: ", "Q: One\nA: ", "Q: two\nA: "], ["one", "three"]) == 2
    assert shared_questions(["", "?"], ["", "!"]) == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "How many is 1,080 + Ｘ?",
        "Q: how many is 1,080 + X?\nA: ",
        "Q: one?\nA: 1\n\nQ: how many is 1,080 + X?\nA:",
        "Question: how many is\n 1,080 + X?\nAnswer:",
        "question one\nAnswer: 1\n\nhow many is 1,080 + X?\nAnswer:",
        instruction_prompt("How many is 1,080 + X?"),
        instruction_prompt("How many is", "1,080 + X?").replace("\n\n### Input:\n", " "),
    ],
)
def test_the_question_in_a_prompt(prompt):
    assert question_text(prompt) == "how many is 1 080 x"


@needs_data("mmlu")
def test_forms_that_are_not_questions_and_answers():
    text = question_text(LORA_ONE_PROMPT.replace("{prompt}", "def f(a):"))
    assert text.startswith("complete the following python code")
    assert text.endswith("def f a")
    one = Mmlu(DATA / "mmlu", ["anatomy"]).load()[0].prompt
    assert question_text(one).startswith("a lesion causing compression of the facial nerve")
