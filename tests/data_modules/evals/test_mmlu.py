"""MMLU: every prompt and the scores of a real model against lm-evaluation-harness; bad input."""

import csv
import hashlib
import json
import shutil

import pytest
import torch

from app.models.likelihood import choice_log_likelihoods
from app.models.loading import load_model, load_tokenizer
from app.models.source import resolve_model
from app.utils.errors import InputError
from data_modules.encoding import TextEncoder
from data_modules.evals.mmlu import CATEGORY_OF, Mmlu
from tests.support.paths import DATA, ROOT, needs_data
from tests.support.rows import Hub

ORACLES = ROOT / "tests" / "oracles"
REAL = DATA / "mmlu"
PROMPTS = json.loads((ORACLES / "prompts.json").read_text())

EXAMPLE = ["1 + 1?", "1", "2", "None", "TRUE", "B"]


def write(folder, subject="anatomy", dev=5 * [EXAMPLE], test=(EXAMPLE,)):
    for split, content in (("dev", dev), ("test", test)):
        (folder / split).mkdir(exist_ok=True)
        with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as stream:
            csv.writer(stream).writerows(content)
    return str(folder)


@needs_data("mmlu")
def test_every_prompt_is_that_of_lm_eval():
    """Three subjects character by character, and all 14,042 prompts and right letters by their hash."""
    assert PROMPTS["categories"] == CATEGORY_OF
    questions = Mmlu(str(REAL)).load()
    assert len(questions) == 14042
    by_subject = {}
    for asked in questions:
        by_subject.setdefault(asked.reference["subject"], []).append(asked)
    assert list(by_subject) == sorted(CATEGORY_OF)
    shown = {asked.key: asked.prompt for asked in questions if asked.key in PROMPTS["prompts"]}
    assert len(shown) == 3
    assert all(PROMPTS["prompts"][key] == prompt for key, prompt in shown.items())
    for subject, asked in by_subject.items():
        prompts = [question.prompt for question in asked]
        right = [question.reference["choice"] for question in asked]
        digest = hashlib.sha256(json.dumps([prompts, right]).encode()).hexdigest()
        assert [len(prompts), digest] == PROMPTS["sha256"][subject], subject


def test_a_folder_of_files(tmp_path):
    two = ["Long\nquestion, with a comma ", "a", "b", "c", "d", "C"]
    path = write(tmp_path, test=(EXAMPLE, two))
    benchmark = Mmlu(path, ["anatomy"], shots=1)
    questions = benchmark.load()
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    example = "1 + 1?\nA. 1\nB. 2\nC. None\nD. TRUE\nAnswer:"
    last = "Long\nquestion, with a comma\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert [asked.prompt for asked in questions] == [
        f"{head}{example} B\n\n{example}",
        f"{head}{example} B\n\n{last}",
    ]
    assert [asked.key for asked in questions] == ["anatomy/0", "anatomy/1"]
    assert Mmlu(path, ["anatomy"], shots=0).load()[0].prompt == head + example
    assert benchmark.choices == (" A", " B", " C", " D")


def test_scores_over_all_category_and_subject(tmp_path):
    write(tmp_path)
    write(tmp_path, "virology", test=([*EXAMPLE[:5], "A"],))
    benchmark = Mmlu(str(tmp_path), ["virology", "anatomy"])
    other, stem = benchmark.load()
    names = ["accuracy", "accuracy/stem", "accuracy/other", "accuracy/virology", "accuracy/anatomy"]
    assert benchmark.score_names([other, stem]) == names
    right = {"accuracy": 1, "accuracy/stem": 1, "accuracy/anatomy": 1}
    assert benchmark.score(stem, [" B"]) == right
    wrong = {"accuracy": 0, "accuracy/other": 0, "accuracy/virology": 0}
    assert benchmark.score(other, [" B"]) == wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subjects": ["anatomi"]}, "'anatomi': expected names of MMLU; did you mean anatomy?"),
        ({"subjects": []}, "expected each subject once"),
        ({"subjects": ["anatomy", "anatomy"]}, "expected each subject once"),
        ({"shots": 6}, "shots=6 of mmlu: expected 0 to 5"),
        ({"shots": -1}, "expected 0 to 5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError) as caught:
        Mmlu("x", **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (EXAMPLE[1:], r"row 1 of .*anatomy_test.csv has the 5 cells"),
        ([*EXAMPLE[:5], "1"], r"row 1 of .*expected a question, four options and the letter"),
        ([*EXAMPLE[:5], ""], "row 1 of"),
        ([*EXAMPLE, "B"], "has the 7 cells"),
    ],
)
def test_bad_rows(tmp_path, bad, message):
    with pytest.raises(InputError, match=message) as caught:
        Mmlu(write(tmp_path, test=(EXAMPLE, bad)), ["anatomy"]).load()
    assert "change path of the benchmark mmlu" in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="which is no folder"):
        Mmlu(str(tmp_path / "no")).load()
    path = write(tmp_path, dev=[EXAMPLE])
    with pytest.raises(InputError, match="anatomy has 1 solved examples: expected 5"):
        Mmlu(path, ["anatomy"]).load()
    for path in (tmp_path / "test").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*anatomy_test.csv"):
        Mmlu(str(tmp_path), ["anatomy"], shots=1).load()
    (tmp_path / "test").rmdir()
    (tmp_path / "test.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cannot read .*test.tar.gz"):
        Mmlu(str(tmp_path), ["anatomy"], shots=1).load()


@needs_data("mmlu")
def test_copies_with_a_header_are_refused(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        name = f"abstract_algebra_{split}.csv"
        shutil.copy(REAL / "variant_with_header" / name, tmp_path / split / name)
    with pytest.raises(InputError, match=r"row 0 of .*without a header"):
        Mmlu(str(tmp_path), ["abstract_algebra"]).load()


def test_the_hub(monkeypatch):
    row = {"question": "1 + 1?", "choices": ["1", "2", "None", "TRUE"], "answer": 1}
    rows = [row | {"subject": s} for s in ("anatomy", "virology", "management") for _ in range(5)]
    hub = Hub(monkeypatch, dev=rows, test=rows)
    questions = Mmlu(subjects=["virology", "anatomy"]).load()
    assert [q.key for q in questions[4:6]] == ["virology/4", "anatomy/0"]
    assert {q.reference["choice"] for q in questions} == {" B"}
    assert len(Mmlu(subjects=["anatomy"]).load()) == 5
    splits = [(name, split) for name in ("all", "anatomy") for split in ("dev", "test")]
    assert hub.asked == [("cais/mmlu", *asked) for asked in splits]


@needs_data("mmlu")
@pytest.mark.smollm2
def test_scores_of_a_real_model_are_those_of_lm_eval(smollm2_dir):
    """8 questions each of three subjects; benchmarks/mmlu_agreement.py takes 1,020."""
    oracle = json.loads((ORACLES / "mmlu_scores.json").read_text())["subjects"]
    benchmark = Mmlu(str(REAL), ["world_religions", "management", "abstract_algebra"])
    asked = [q for q in benchmark.load() if int(q.key.split("/")[1]) < 8]
    theirs = torch.tensor([row for subject in benchmark.subjects for row in oracle[subject][:8]])
    source = resolve_model(str(smollm2_dir))
    model, tokenizer = load_model(source), load_tokenizer(source)
    prompts = TextEncoder(tokenizer).prompts([question.prompt for question in asked])
    choices = [tokenizer(choice)["input_ids"] for choice in benchmark.choices]
    ours = torch.cat(
        [
            choice_log_likelihoods(model, model, prompts[start : start + 8], choices)
            for start in range(0, len(prompts), 8)
        ]
    )
    assert ours.shape == theirs.shape == (24, 4)
    torch.testing.assert_close(ours.float(), theirs, atol=2e-4, rtol=0)

    def accuracy(log_likelihoods):
        outputs = [benchmark.choices[place] for place in log_likelihoods.argmax(1)]
        scores = [benchmark.score(q, [output]) for q, output in zip(asked, outputs, strict=True)]
        return sum(score["accuracy"] for score in scores)

    assert accuracy(ours) == accuracy(theirs) > 0
