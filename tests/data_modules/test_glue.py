"""GLUE: the real files with all their traps, and input that cannot be used."""

import gzip
import json
import shutil

import pytest

from app.utils.errors import InputError
from data_modules.glue import TASKS, GlueDataModule
from tests.support.paths import DATA, needs_data
from tests.support.rows import Hub, unplug_hub, write_jsonl

REAL = DATA / "glue"
SMALL = {
    "SST-2/train.tsv": "sentence\tlabel\nunflinchingly bleak \t0\n`` good '' \t1\n",
    "SST-2/dev.tsv": "sentence\tlabel\nfine \t1\n",
    "SST-2/test.tsv": "index\tsentence\n0\tno label here\n",
    "CoLA/train.tsv": "gj04\t1\t\tHe left.\ngj04\t0\t*\tLeft he.\ngj04\t1\t\tHe left.\n"
    "x\t1\t\tShe ran.\n",
    "CoLA/test.tsv": "index\tsentence\n0\tBill left.\n",
    "MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    '1\t7\t8\t" He said\tHe said # it\n0\t9\t10\t"one\t"two\n',
    "MRPC/dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n",
    "QNLI/train.tsv": 'index\tquestion\tsentence\tlabel\n0\t"Who?\tHe.\tentailment\n'
    "7\tWhy?\tNo.\tnot_entailment\n",
    "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n",
    "MNLI/train.tsv": "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n"
    "5\t1\t One. \tn/a\tneutral\tcontradiction\n9\t2\tTwo.\tTo\u2028o.\tneutral\t-\n",
    "MNLI/dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
    "0\tA\tB\tentailment\tneutral\tneutral\n",
}


@pytest.fixture
def folder(tmp_path):
    """A GLUE folder of two-line files in the published forms."""
    for name, text in SMALL.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text.encode())
    return tmp_path


def load(task, path, **options):
    return GlueDataModule(task, path=str(path), **options)


def texts(data, split="train"):
    return [(row.prompt, row.answer, row.target) for row in data.rows(split)]


QNLI = "classify the semantic similarity of the question and the sentence"
PROMPTS = {
    "sst2": [
        ("classify the sentiment of the text: unflinchingly bleak", "negative", 0),
        ("classify the sentiment of the text: `` good ''", "positive", 1),
    ],
    "mrpc": [  # quotes and number signs are text
        ('classify the semantic similarity of the text: " He said\nHe said # it', "equivalent", 1),
        ('classify the semantic similarity of the text: "one\n"two', "different", 0),
    ],
    "qnli": [
        (f'{QNLI}: "Who?\nHe.', "entailment", 0),
        (f"{QNLI}: Why?\nNo.", "not_entailment", 1),
    ],
    "mnli": [  # the gold label; a row has none
        ("classify the semantic similarity of the text: One.\nn/a", "contradiction", 2)
    ],
}


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts(task, folder):
    rows = [(f"{prompt}\nresult: ", *rest) for prompt, *rest in PROMPTS[task]]
    data = load(task, folder)
    assert texts(data) == rows
    assert texts(load(task, folder / TASKS[task].folder)) == rows, "the task's own folder"
    assert data.rows("test") == data.rows("validation") != []
    assert data.describe()["dropped_rows"]["train"] == (task == "mnli")


def test_prompts_of_cola_have_no_header(folder):
    data = load("cola", folder, validation_size=1)
    prefix = "classify the grammaticality of the text: "
    everything = texts(data) + texts(data, "validation")
    assert len(everything) == 4
    assert (f"{prefix}Left he.\nresult: ", "unacceptable", 0) in everything
    assert (f"{prefix}He left.\nresult: ", "acceptable", 1) in everything


def test_rows_set_aside_validate_and_the_published_set_is_still_reported(folder):
    published = load("sst2", folder).rows("test")
    data = load("sst2", folder, validation_size=1)
    assert data.rows("test") == published
    assert len(data.rows("train")) == len(data.rows("validation")) == 1
    assert not set(data.rows("train")) & set(data.rows("validation"))


def test_no_validation_set(folder):
    data = load("cola", folder, validation_size=1)
    assert data.rows("test") == data.rows("validation")
    line = "gj04\t1\t\tSentence number {}.\n"
    (folder / "CoLA" / "train.tsv").write_text("".join(line.format(i) for i in range(40)))
    data = load("cola", folder)
    with pytest.warns(UserWarning, match=r"no dev.tsv: 4 training rows.*data.validation_size"):
        held_out = data.rows("validation")
    assert len(held_out) == 4
    assert len(data.rows("train")) == 36
    assert not set(data.rows("train")) & set(held_out)


def test_first_file_that_exists_or_the_named_one(folder):
    row = {"premise": "P", "hypothesis": "n/a", "label": "neutral"}
    packed = folder / "MNLI" / "train_more.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert texts(load("mnli", folder))[0][1] == "contradiction"
    data = load("mnli", folder, train_file="train_more.jsonl.gz")
    assert texts(data)[0][1:] == ("neutral", 1)
    assert data.describe()["source"].endswith("MNLI (train_more.jsonl.gz, dev_matched.tsv)")
    packed.rename(packed.with_name("train.jsonl.gz"))
    (folder / "MNLI" / "train.tsv").unlink()
    assert texts(load("mnli", folder))[0][1:] == ("neutral", 1)


def test_labels_by_number_are_the_hubs(folder):
    rows = [{"premise": "P", "hypothesis": "H", "label": label} for label in (0, 1, 2)]
    write_jsonl(folder / "MNLI" / "numbers.jsonl", *rows)
    answers = [row[1:] for row in texts(load("mnli", folder, train_file="numbers.jsonl"))]
    assert answers == [("entailment", 0), ("neutral", 1), ("contradiction", 2)]


def test_a_test_set_needs_labels(folder):
    for task in ("sst2", "cola"):
        with pytest.raises(InputError, match=r"test.tsv has no labels.*data.test_split=validation"):
            load(task, folder, test_split="test", validation_size=1).rows("test")
    with pytest.raises(InputError, match=r"MRPC has no test set.*found dev.tsv, train.tsv"):
        load("mrpc", folder, test_split="test").rows("test")
    shutil.copy(folder / "SST-2" / "dev.tsv", folder / "SST-2" / "test.tsv")
    assert len(load("sst2", folder, test_split="test").rows("test")) == 1


def test_an_unknown_label_and_a_set_without_rows(folder):
    (folder / "SST-2" / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(InputError, match="has no validation rows"):
        load("sst2", folder).rows("train")
    with (folder / "SST-2" / "train.tsv").open("a") as file:
        file.write("so so\tmixed\n")
    with pytest.raises(InputError, match=r"line 4 of .*train.tsv has the label 'mixed': expected"):
        load("sst2", folder).rows("train")


def test_folders_without_the_files(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for task, path, message in (
        ("sst2", empty / "nowhere", r"data.path=.*nowhere: expected a GLUE folder"),
        ("sst2", empty, r"expected train.tsv or .*found nothing"),
        ("qnli", folder / "SST-2", "has sentence, label: expected the fields question, sentence"),
        ("cola", folder / "SST-2", r"line 1 of .* has 2 columns: expected 4 \(source"),
    ):
        with pytest.raises(InputError, match=f"{message}.*change --data"):
            load(task, path).rows("train")
    (empty / "training.csv").touch()
    with pytest.raises(InputError, match=r"found training.csv; change --data.path"):
        load("sst2", empty).rows("train")


def test_the_hub(monkeypatch, tmp_path):
    def rows(label):
        return [{"premise": "P ", "hypothesis": "H", "label": label, "idx": 0}]

    hub = Hub(monkeypatch, train=rows(0), validation_matched=rows(1), test_matched=rows(-1))
    data = GlueDataModule("mnli")
    prompt = "classify the semantic similarity of the text: P\nH\nresult: "
    assert texts(data) == [(prompt, "entailment", 0)]
    assert texts(data, "test") == [(prompt, "neutral", 1)]
    assert data.describe()["source"] == hub.asked[0][0] == "nyu-mll/glue"
    assert hub.probed == ["nyu-mll/glue"]  # once for all splits
    with pytest.raises(InputError, match="has no labels, which GLUE withholds"):
        GlueDataModule("mnli", test_split="test").rows("test")
    unplug_hub(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"nyu-mll/glue \(sst2\).*data.path.*SST-2/train.tsv"):
        GlueDataModule("sst2").rows("train")


def test_wrong_settings():
    for name, meant in (("sst-2", "sst2"), ("MNLI", "mnli"), ("colla", "cola")):
        with pytest.raises(InputError, match=rf"data.task={name}: .*did you mean {meant}\?"):
            GlueDataModule(name)
    with pytest.raises(InputError, match=r"data.train_file=train_10k.jsonl.gz.*data.path"):
        GlueDataModule("mnli", train_file="train_10k.jsonl.gz")


@needs_data("glue")
@pytest.mark.parametrize(
    ("task", "num_train", "num_dev", "options"),
    [
        ("sst2", 67349, 872, {}),
        ("cola", 8051, 500, {"validation_size": 500}),
        ("mrpc", 3667, 408, {}),
        ("qnli", 9999, 5463, {}),
        ("qnli", 320, 5463, {"train_file": "train_kshot.tsv"}),
        ("mnli", 480, 9815, {}),
        ("mnli", 9999, 9815, {"train_file": "train_10k.jsonl.gz"}),
    ],
)
def test_real_files(task, num_train, num_dev, options):
    data = load(task, REAL, **options)
    rows = {split: data.rows(split) for split in ("train", "validation")}
    assert (len(rows["train"]), len(rows["validation"])) == (num_train, num_dev)
    for row in rows["train"] + rows["validation"]:
        body = row.prompt.removeprefix(TASKS[task].prefix)
        sentences = body.removesuffix("\nresult: ").split("\n")
        assert len(sentences) == len(TASKS[task].columns) - 1
        assert all(sentence == sentence.strip() for sentence in sentences)
    assert {row.target for row in rows["train"]} == set(range(len(data.label_words)))


@needs_data("glue")
def test_real_labels_duplicates_and_hypotheses_that_look_missing():
    data = load("cola", REAL, validation_size=500)
    sides = [data.rows(split) for split in ("train", "validation")]
    assert sum(row.target for side in sides for row in side) == 6023
    assert not {row.prompt for row in sides[0]} & {row.prompt for row in sides[1]}
    rows = load("mnli", REAL, train_file="train_10k.jsonl.gz").rows("train")
    assert sum(row.prompt.endswith("\nn/a\nresult: ") for row in rows) == 2


@needs_data("glue")
def test_real_files_again_by_the_words_of_their_lines():
    lines = (REAL / "MNLI" / "train.tsv").read_bytes().decode().split("\n")[1:-1]
    last = [line.split("\t")[-1] for line in lines]
    assert [row.answer for row in load("mnli", REAL).rows("train")] == last
    lines = (REAL / "MRPC" / "dev.tsv").read_bytes().decode("utf-8-sig").split("\n")[1:-1]
    targets = [str(row.target) for row in load("mrpc", REAL).rows("validation")]
    assert targets == [line[0] for line in lines]
