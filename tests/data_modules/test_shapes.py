"""Files as people have them, in tests/data/shapes: the rows that each gives, or the line that refuses it."""

import random
import warnings
from pathlib import Path

import pytest

from app.utils.errors import InputError
from data_modules.chat import ChatDataModule
from data_modules.table import TableDataModule

SEEDS = 12
SHAPES = Path(__file__).parents[1] / "data" / "shapes"
FILMS = ["a fine film>good", "a dull film>bad"]
AB = ["a>good", "b>bad"]
TABLES = {
    # Prompt and answer of each row.
    "bom.csv": FILMS,
    "crlf.csv": FILMS,
    "cr.csv": FILMS,
    "no_last_newline.csv": FILMS,
    "UPPER.CSV": AB,
    "brackets[1].csv": AB,
    "packed.csv.gz": AB,
    "packed.jsonl.gz": AB,
    "list.json": AB,
    "bom_list.json": AB,
    "empty_lines.jsonl": AB,
    "rows.parquet": ["a>1", "b>0"],
    "quotes.csv": ['He said "fine", twice>good', "two\nlines, one cell>bad"],
    "quotes.tsv": ['"Fine," he said>good', 'an odd " quote>bad'],
    "unicode.csv": ["影片很好 🎬>good", "سيئ جدا>bad", "e\u0301tude naïve>good"],
    "nul.csv": ["a\0b>good", "c>bad"],
    "escapes.jsonl": ["café 🎬 \0>good", "b>bad"],
    "null_words.csv": ["null>good", "NA>bad", "None>good", "n/a>bad"],
    "leading_zeros.csv": ["a>01", "b>1", "c>01"],
    "numbers.jsonl": ["a>10", "b>2", "c>0", "d>2"],
    "whole_floats.jsonl": ["a>0", "b>1"],
    "booleans.jsonl": ["a>True", "b>False"],
    "mixed_types.jsonl": ["a>1", "7>two", "c>1"],
    # Rows that are left out, or there twice, are counted.
    "empty_cells.csv": [
        "a>good",
        "c>bad",
        "rows of .* left out: 2 without_text, 1 without_label",
    ],
    "missing_cell.csv": ["a>good", "c>bad", "left out: 1 without_label"],
    "missing_field.jsonl": ["a>good", "d>bad", "left out: 1 without_text, 1 without_label"],
    "minus_one.jsonl": ["a>0", "b>1", "c>-1", "left out: 1 without_label"],
    "duplicates.csv": ["a>good", "b>bad", "a>good", "a>good", "c>bad", "2 of 5 rows of .* repeat"],
    # Refused.
    "header_only.csv": "header_only.csv has no rows: expected some; change --data.path",
    "empty.csv": r"cannot read .*empty.csv \(No columns to parse from file\)",
    "empty_list.json": "has no rows: expected some",
    "one_row.csv": "all rows of .* have the label 'good': expected two classes or more",
    "one_class.csv": "all rows of .* have the label 'good': expected two classes or more",
    "many_classes.csv": "'label' of .* has 300 different values: expected at most 256 classes",
    "no_text_left.csv": "has no row with both a text and a label",
    "no_label_column.csv": "has the columns 'text', 'lable': expected 'label'; .* --data.label, .* mean lable",
    "space_in_header.csv": "has the columns 'text', ' label': expected 'label'",
    "no_header.csv": "has the columns 'a fine film', 'good': expected 'text'; .* --data.text",
    "semicolons.csv": "has the columns 'text;label': expected 'text'; .* of .csv are commas",
    "under_a_key.json": "has the columns 'data': expected 'text'",
    "extra_cell.csv": r"row 0 of .* more cells than the 2 columns of the header \('text', 'label'\)",
    "extra_cell_later.csv": "Expected 2 fields in line 3, saw 3",
    "two_text_columns.csv": r"cannot read .* \(it has two columns 'text': expected one of each name\)",
    "tab_in_cell.tsv": "row 0 of .* more cells than the 2 columns of the header",
    "unclosed_quote.csv": "EOF inside string starting at row 1",
    "latin1.csv": "can't decode byte 0xe9 .*expected UTF-8 text",
    "utf16.csv": "can't decode byte 0xff .*expected UTF-8 text",
    "half_character.jsonl": "surrogate pair in string is invalid. in row 0",
    "cut_short.jsonl": "JSON parse error: .* in row 1",
    "cut_short.jsonl.gz": "ended before the end-of-stream marker",
    "null_first.jsonl": "it begins with null: expected an object",
    "null_first.json": "it begins with null: expected an object",
    "web_page.jsonl": "JSON parse error: Invalid value. in row 0",
    "no_parquet.parquet": "not a parquet file",
    "notes.txt": "cannot tell the form of .*notes.txt: expected a file .csv, .tsv, .json",
    "columns.json": r"row 0 of .* has .*\(list\) as text: expected text",
    "nested.jsonl": r"row 0 of .* has .*\(dict\) as text: expected text",
    "dates.jsonl": r"row 0 of .* has .*\(datetime\) as text: expected text",
    "list_label.jsonl": r"row 0 of .* has .*\(list\) as label: expected a word or a whole number",
    "float_label.jsonl": r"row 0 of .* has '0.5' \(float\) as label: expected a word or a whole",
    "missing.csv": r"--data.path=.*missing.csv is no file",
}
HI = ["user: Hi", "assistant> Hello."]
BRIEF = ["system: Be brief.", *HI]
CHATS = {
    # The turns of each conversation: "role: read" or "role> learnt".
    "messages.jsonl": [[*BRIEF, "user: 1+1?", "assistant> 2"], ["user: Bye", "assistant> Bye."]],
    "bom_crlf.jsonl": [["user: q0", "assistant> a0"], ["user: q1", "assistant> a1"]],
    "rows.parquet": [HI],
    "sharegpt.json": [BRIEF],
    "developer.jsonl": [BRIEF],
    "prompt_completion.jsonl": [["user: 1+1=", "assistant>  2"]],
    "prompt_completion_messages.jsonl": [
        ["user: Hi", "assistant: Hello.", "user: Bye", "assistant> Bye."]
    ],
    "alpaca.json": [["user: Add\n\n1 and 1", "assistant> 2"], ["user: Greet", "assistant> Hi."]],
    "alpaca_history.json": [
        ["system: Be brief.", "user: Greet", "assistant> Hi.", "user: Again", "assistant> Hello."]
    ],
    "parts.jsonl": [["user: Hi there", "assistant> Hello."]],
    "weight.jsonl": [["user: Hi", "assistant: Hey.", "user: Hi!", "assistant> Hello."]],
    "more_fields.jsonl": [HI, ["user: Bye", "assistant> Bye."]],
    # Counted.
    "begins_with_gpt.jsonl": [HI, "1 conversations of .* begin with the assistant"],
    "ends_with_user.jsonl": [HI, "1 conversations of .* end with turns that are not answered"],
    "tools.jsonl": [
        HI,
        "1 conversations of .* have tools, which are not written into their prompts",
    ],
    "reasoning.jsonl": [
        HI,
        "1 conversations of .* have reasoning beside the content of messages, which is left out",
    ],
    "duplicates.jsonl": [HI, HI, HI, "2 of 3 rows of .* repeat another row"],
    "no_answer.jsonl": [HI, {"no_question_or_answer": 3}],
    "empty_answer.jsonl": [HI, {"empty_answer": 2}],
    "tool_calls.jsonl": [HI, {"tool_calls": 2}],
    "function_call.jsonl": [HI, {"tool_calls": 1}],
    # Refused.
    "unknown_role.jsonl": "message 1 of row 0 of .* has the role 'narrator': expected system, user or",
    "no_role.jsonl": "message 0 of row 0 of .* has the role None",
    "image.jsonl": "message 0 of row 0 of .* in its content: expected text alone",
    "text_in_json.jsonl": "row 0 of .* as its messages: expected a list of them",
    "list_of_texts.jsonl": "row 0 of .* as its messages: expected a list of them",
    "prompt_of_texts.jsonl": "row 0 of .* as its messages: expected a list of them",
    "history_keys.jsonl": "row 0 of .* has the history .* expected pairs of question and answer",
    "number.jsonl": "message 1 of row 0 of .* has '0' in its content: expected text alone",
    "other_columns.jsonl": "row 0 of .* has 'question', 'answer': expected one of the forms messages; conv",
}


def test_every_file_has_an_expectation():
    files = {file.name for file in SHAPES.iterdir() if file.is_file()}
    assert files == TABLES.keys() - {"missing.csv"}
    assert {file.name for file in (SHAPES / "chat").iterdir()} == CHATS.keys()
    assert len(files) >= 30


def check(read, expected):
    """Compare what `read` returns, and what it warns of, or the error that it raises."""
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as raised:
            read()
        assert "\n" not in str(raised.value)
        return
    told = [part for part in expected if isinstance(part, str) and ">" not in part]
    if told:
        with pytest.warns(UserWarning, match=told[0]):
            rows = read()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            rows = read()
    assert rows == [part for part in expected if part not in told and not isinstance(part, dict)]


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    data = TableDataModule(str(SHAPES / name), prompt="{text}", validation_size=0, test_size=0)

    def read():
        return [f"{row.prompt}>{row.answer}" for row in data.load()["train"]]

    check(read, TABLES[name])


@pytest.mark.parametrize("name", CHATS)
def test_chats(name):
    data = ChatDataModule(str(SHAPES / "chat" / name))

    def read():
        data.read()
        marks = {True: ">", False: ":"}
        return [
            [f"{turn.role}{marks[turn.learnt]} {turn.content}" for turn in row.turns]
            for row in data._candidates
        ]

    check(read, CHATS[name])
    counts = {what: count for what, count in data.dropped_rows.items() if count}
    wanted = [part for part in CHATS[name] if isinstance(part, dict)]
    assert counts == (wanted[0] if wanted else {})


def damaged(content, rng):
    """Return bytes cut short, or with some replaced, removed, doubled or put in."""
    at, size = rng.randrange(len(content)), rng.randrange(1, 9)
    odd = rng.choice([b"\0", b"\xff\xfe\x80", b'"', b"\n", b"\r", b",", b"{", b"]", b"\t", b"\x1a"])
    return rng.choice(
        [
            content[:at],
            content[:at] + odd + content[at:],
            content[:at] + odd + content[at + size :],
            content[:at] + content[at + size :],
            content[: at + size] + content[at:],
            content[at:],
        ]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [TableDataModule, ChatDataModule])
def test_damaged_files_give_rows_or_one_line(kind, tmp_path):
    """Files of each form, damaged at random."""
    folder, known = (SHAPES, TABLES) if kind is TableDataModule else (SHAPES / "chat", CHATS)
    names = ["quotes.csv", "quotes.tsv", "mixed_types.jsonl", "list.json", "packed.csv.gz"]
    names += ["messages.jsonl", "sharegpt.json", "tool_calls.jsonl", "rows.parquet"]
    tried, refused = 0, 0
    for name in [name for name in names if name in known]:
        content = (folder / name).read_bytes()
        for seed in range(SEEDS):
            file = tmp_path / f"{seed}-{name}"
            file.write_bytes(damaged(content, random.Random(seed)))
            data = kind(str(file), validation_size=0)
            told = ""
            try:
                data.read() if kind is ChatDataModule else data.load()
            except InputError as error:
                told = str(error)
                refused += 1
            assert "\n" not in told
            tried += 1
    assert 0.2 < refused / tried < 0.95
