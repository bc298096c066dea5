"""The commonsense sets: the real files, what is read in outputs, and input that cannot be used."""

import json

import pytest

from app.utils.errors import InputError
from data_modules.evals.commonsense import OPTIONS, Commonsense, first_option
from tests.support.paths import DATA, needs_data

REAL = DATA / "commonsense"

FIVE = tuple(f"answer{i}" for i in range(1, 6))
SETS = {
    "boolq": (3270, ("true", "false")),
    "piqa": (1838, ("solution1", "solution2")),
    "social_i_qa": (1954, FIVE),
    "hellaswag": (10042, tuple(f"ending{i}" for i in range(1, 5))),
    "winogrande": (1267, ("option1", "option2")),
    "ARC-Easy": (2376, FIVE),
    "ARC-Challenge": (1172, FIVE),
    "openbookqa": (500, FIVE),
}
ROW = {
    "instruction": "Is it?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}

ENDINGS = {
    "instruction": "Please choose the correct ending to complete the given sentence: Travel: [header] How "
    "to become an au pair in spain [title] Consult online databases that list opportunities for working as "
    "an au pair in spain. [step] Alternatively, contract the services of a firm which will charge a fee in "
    "return for finding a position and providing logistical support throughout your stay. [title] Ensure "
    "that your language skills are adequate for your potential employers' needs.\n\nEnding1: [step] Not "
    "ensuring fluent skills can be difficult, and employers may see you as weak in language such as spanish "
    "or french as a vulnerable you. A respectful, educated, articulate language can also be valuable. "
    "Ending2: [step] Correspond with all potential employers before leaving for spain. [title] Agree to "
    "terms with your employer before accepting a position. Ending3: [step] Speak english, french and spanish "
    "as many times as you can. A few words may not be enough if you are already an au pair but your english "
    "skills are desirable. Ending4: [step] You can find a formal language program in madrid or milan in the "
    "region to apply for a job in this area. Also check to ensure that you both can speak english and french."
    "\n\nAnswer format: ending1/ending2/ending3/ending4",
    "input": "",
    "output": "the correct answer is ending2",
    "answer": "ending2",
}


def write(folder, name, content):
    (folder / name).mkdir()
    (folder / name / "test.json").write_text(json.dumps(content))
    return str(folder)


@needs_data("commonsense")
def test_the_real_files():
    """All rows are read, and the sentence that models are trained to write is right in each."""
    sets = [name for name in SETS if name != "hellaswag"]  # not among the files
    benchmark = Commonsense(str(REAL), sets)
    questions = benchmark.load()
    number = 0
    for name in sets:
        size, words = SETS[name]
        rows = json.loads((REAL / name / "test.json").read_text())
        assert len(rows) == size
        for place, row in enumerate(rows):
            asked, number = questions[number], number + 1
            assert asked.key == f"{name}/{place}"
            right = {"accuracy": 1, f"accuracy/{name}": 1}
            assert benchmark.score(asked, [row["output"]]) == right
            wrong = next(word for word in words if word != row["answer"])
            assert benchmark.score(asked, [wrong])["accuracy"] == 0
            assert row["instruction"] in asked.prompt
    assert number == len(questions) == 12377
    assert benchmark.score_names(questions) == ["accuracy", *(f"accuracy/{s}" for s in sets)]


def test_a_real_row_of_hellaswag(tmp_path):
    benchmark = Commonsense(write(tmp_path, "hellaswag", [ENDINGS]), "hellaswag")
    [asked] = benchmark.load()
    assert asked.prompt.endswith(f"{ENDINGS['instruction']}\n\n### Response:\n")
    for output, accuracy in ((ENDINGS["output"], 1), ("the correct answer is ending3", 0)):
        scores = {"accuracy": accuracy, "accuracy/hellaswag": accuracy}
        assert benchmark.score(asked, [output]) == scores


def test_each_option_is_read():
    assert list(OPTIONS) == list(SETS)
    for name, (_, words) in SETS.items():
        assert [first_option(name, f"It is {word}.") for word in words] == list(words)


@pytest.mark.parametrize(
    ("name", "output", "read"),
    [
        ("boolq", "the correct answer is false", "false"),
        ("boolq", "true or false? false", "true"),  # the first one counts
        ("boolq", "True", None),
        ("boolq", "yes", None),
        ("boolq", "", None),
        ("piqa", "solution2\n\n### Instruction", "solution2"),
        ("piqa", "Solution2", None),
        ("piqa", "solution3 or solution1", "solution1"),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("hellaswag", "Ending1 or ending5 or ending3", "ending3"),
        ("winogrande", "option3", None),
        ("winogrande", "the correct answer is option2 and not option1", "option2"),
        ("ARC-Easy", "the correct answer is answer4", "answer4"),
        ("ARC-Easy", "answer6", None),
        ("ARC-Easy", "answer 4", None),
        ("ARC-Easy", "option4", None),
    ],
)
def test_the_first_option_is_read(name, output, read):
    assert first_option(name, output) == read


def test_the_prompt(tmp_path):
    benchmark = Commonsense(write(tmp_path, "boolq", [ROW]), task="boolq")
    [asked] = benchmark.load()
    assert asked.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nIs it?\n\nAnswer format: true/false\n\n"
        "### Response:\n"
    )
    assert (benchmark.decoding.max_new_tokens, benchmark.decoding.temperature) == (32, 0)
    assert benchmark.score(asked, ["true", "false"]) == {"accuracy": 0.5, "accuracy/boolq": 0.5}
    assert benchmark.score_names([asked]) == ["accuracy", "accuracy/boolq"]


def test_the_mean_of_sets_counts_each_set_once():
    scores = {"accuracy": 0.9, "accuracy/boolq": 1.0, "accuracy/piqa": 0.25}
    assert Commonsense("x").combine(scores) == {"mean_of_sets": 0.625, **scores}


@pytest.mark.parametrize("task", ["siqa", [], ["boolq", "boolq"], ["boolq", "arc"]])
def test_unknown_sets(task):
    with pytest.raises(InputError, match=r"task=.*expected one of boolq, piqa"):
        Commonsense("x", task)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ROW, {"instruction": "Is it?"}], "row 1 of .* has instruction: expected the fields"),
        ([{**ROW, "answer": True}], "row 0 of .* has true as answer: expected text"),
        ([{**ROW, "answer": "answer1"}], "row 0 of .* has the answer 'answer1'"),
        ([{**ROW, "answer": "true!"}], "row 0 of .* has the answer 'true!'"),
        ([{**ROW, "input": "a passage"}], "the input 'a passage'"),
        ({"rows": [ROW]}, "line 1 of .* has rows: expected the fields"),
    ],
)
def test_bad_rows(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        Commonsense(write(tmp_path, "boolq", content), "boolq").load()
    assert "path of the benchmark commonsense" in str(caught.value)
    with pytest.raises(InputError, match=r"cannot read .*test.json"):
        Commonsense(str(tmp_path), "piqa").load()
