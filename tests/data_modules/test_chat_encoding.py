"""Conversations in the published chat templates, token by token: who says what, and what is learnt."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from app.utils.errors import InputError
from data_modules.chat_encoding import ChatEncoder
from data_modules.rows import Turn

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
NAMES = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
IM = ("<|im_start|>", "<|im_end|>")
SPECIAL = {
    "chatml": IM,
    "qwen2_5": IM,
    "qwen3": IM,
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama3_1": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
}
END = {**dict.fromkeys(("chatml", "qwen2_5", "qwen3"), "<|im_end|>")}
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"


def plain(name):
    """Return a template without the marks of what the assistant writes, as it is published."""
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", (TEMPLATES / f"{name}.jinja").read_text())


@pytest.fixture
def tokenizer(request, tiny_tokenizer):
    """Return a tokenizer with a template's special tokens; its EOS ends a turn where the model's does."""
    return with_template(tiny_tokenizer, request.param)


def with_template(tokenizer, name):
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[name])})
    tokenizer.eos_token = END.get(name, "<eos>")
    tokenizer.chat_template = plain(name)
    return tokenizer


def words():
    """Return a tokenizer that marks the start of a word, and of a text, as SentencePiece does."""
    letters = "abcdefghijklmnopqrstuvwxyz\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!<>/|_[]-'▁"
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<bos>", "<eos>", *letters])}
    merges = [("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyz"] + [("\n", "\n")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def said(*texts, system=None):
    """Return a conversation of user and assistant in turn, all of whose answers are learnt."""
    turns = [Turn("system", system)] if system else []
    roles = ("user", "assistant")
    return [*turns, *(Turn(roles[i % 2], text, i % 2 == 1) for i, text in enumerate(texts))]


SHORT = said("Hi ", "Hello.", "1+1?", "2\n")
SHORT_WITH_SYSTEM = said("Hi", "Hello.", "1+1?", "2", system="Be brief.")
HAND_WRITTEN = {
    # What is read, what is learnt, in turn; a row for each answer where earlier turns are rewritten.
    ("chatml", "SHORT"): [
        [
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
            "Hello.<|im_end|>",
            "\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "2\n<|im_end|>",
        ]
    ],
    ("chatml", "SHORT_WITH_SYSTEM"): [
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "Hello.<|im_end|>",
            "\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "2<|im_end|>",
        ]
    ],
    ("llama3", "SHORT"): [
        [
            f"<bos>{LLAMA.format('user')}Hi<|eot_id|>{LLAMA.format('assistant')}",
            "Hello.<|eot_id|>",
            f"{LLAMA.format('user')}1+1?<|eot_id|>{LLAMA.format('assistant')}",
            "2<|eot_id|><eos>",
        ]
    ],
    ("llama3_1", "SHORT_WITH_SYSTEM"): [
        [
            f"<bos>{LLAMA.format('system')}{DATES}Be brief.<|eot_id|>"
            f"{LLAMA.format('user')}Hi<|eot_id|>{LLAMA.format('assistant')}",
            "Hello.<|eot_id|>",
            f"{LLAMA.format('user')}1+1?<|eot_id|>{LLAMA.format('assistant')}",
            "2<|eot_id|><eos>",
        ]
    ],
    ("qwen2_5", "SHORT"): [
        [
            f"{QWEN}<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
            "Hello.<|im_end|>",
            "\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "2\n<|im_end|>",
        ]
    ],
    ("qwen3", "SHORT"): [
        [
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nHello.<|im_end|>",
        ],
        [
            "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\n2\n<|im_end|>",
        ],
    ],
    ("gemma", "SHORT"): [
        [
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
            "Hello.<end_of_turn>",
            "\n<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n",
            "2<end_of_turn><eos>",
        ]
    ],
    ("mistral", "SHORT"): [
        ["<bos>[INST] Hi [/INST]", " Hello.<eos>", "[INST] 1+1?[/INST]", " 2<eos>"]
    ],
    # The system message stands in the question that is asked, and nowhere else.
    ("mistral", "SHORT_WITH_SYSTEM"): [
        ["<bos>[INST] Be brief.\n\nHi[/INST]", " Hello.<eos>"],
        ["<bos>[INST] Hi[/INST] Hello.<eos>[INST] Be brief.\n\n1+1?[/INST]", " 2<eos>"],
    ],
}


@pytest.mark.parametrize(("tokenizer", "turns"), HAND_WRITTEN, indirect=["tokenizer"])
def test_who_says_what(tokenizer, turns, request):
    """Against a rendering by hand; of this tokenizer, every character is a token."""
    name = request.node.callspec.params["tokenizer"]
    encoder = ChatEncoder(tokenizer)
    rows = [encoder.row(part, 0, "row 0") for part in encoder.rows_of(globals()[turns], "row 0")]
    expected = HAND_WRITTEN[name, turns]
    assert len(rows) == len(expected)
    for row, stretches in zip(rows, expected, strict=True):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in stretches]
        assert [*row.prompt_ids, *row.answer_ids] == [token for part in ids for token in part]
        labels = [
            token if number % 2 else -100 for number, part in enumerate(ids) for token in part
        ]
        assert [-100] * len(row.prompt_ids) + row.labels == labels
        assert row.num_supervised == sum(token != -100 for token in labels)


CONTENTS = ("Hi", " a b ", "x\n", "\nWhy?", "a\n\nb", "<think>\nhm\n</think>\n\nyes", "</s>", "'s")


@pytest.mark.parametrize("kind", ["characters", "words"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_of_the_template(name, kind, tiny_tokenizer):
    """Against transformers' mask of the same template with marks, for 60 random conversations."""
    tokenizer = with_template(words() if kind == "words" else tiny_tokenizer, name)
    tagged = (TEMPLATES / f"{name}.jinja").read_text()
    encoder, rng, compared = ChatEncoder(tokenizer), random.Random(0), 0
    for _ in range(60):
        system = rng.choice([None, "Be brief."]) if name not in ("gemma", "mistral") else None
        turns = said(*rng.choices(CONTENTS, k=2 * rng.randint(1, 3)), system=system)
        for part in encoder.rows_of(turns, "row 0"):
            row = encoder.row(part, 0, "row 0")
            messages = [{"role": turn.role, "content": turn.content} for turn in part]
            oracle = tokenizer.apply_chat_template(
                messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = oracle["input_ids"], list(oracle["assistant_masks"])
            if not part[1 + bool(system)].learnt:  # a row of the last answer
                last = len(mask) - mask[::-1].index(1)
                start = max(i for i in range(last) if not mask[i]) + 1
                mask = [int(start <= i < last) for i in range(len(mask))]
            size = len(mask) - mask[::-1].index(1)
            wanted = [token if marked else -100 for token, marked in zip(ids, mask, strict=True)]
            found = [-100] * len(row.prompt_ids) + row.labels
            if ids[size - 1] != tokenizer.eos_token_id:
                assert found.pop() == tokenizer.eos_token_id
            if merges_across(encoder, part):
                continue
            assert found == wanted[:size], messages
            assert [*row.prompt_ids, *row.answer_ids][:size] == ids[:size]
            compared += 1
    assert compared >= 40


def merges_across(encoder, turns):
    """Return whether a token of the whole text holds the end of a question and the start of its answer."""
    text, answers = encoder._answers(turns, "row 0")
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [
        encoder.tokenizer(text[:bound], add_special_tokens=False)["input_ids"]
        for answer in answers
        for bound in answer
    ]
    return any(ids[: len(part)] != part for part in parts)


def test_a_token_across_the_start_of_an_answer_is_two():
    """The model is asked behind one line break, so that it cannot answer with two in one token."""
    tokenizer = with_template(words(), "chatml")
    (whole,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"][1:]
    row = ChatEncoder(tokenizer).row(said("a", "\nb", "c", "d"), 0, "row 0")
    ids = [*row.prompt_ids, *row.answer_ids]
    assert whole not in ids
    break_ = tokenizer.convert_tokens_to_ids("\n")
    assert (row.prompt_ids[-1], row.answer_ids[0], row.labels[0]) == (break_, break_, break_)


def test_an_answer_is_read_as_it_stands_behind_its_question(tiny_tokenizer):
    """Behind a line break "'s" is one token, behind another sign it is two."""
    core = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"]["'s"] = len(tiny_tokenizer)
    core["model"]["merges"] = [["'", "s"]]
    core = Tokenizer.from_str(json.dumps(core))
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    row = ChatEncoder(with_template(tokenizer, "chatml")).row(said("a", "'s", "b", "c"), 0, "row 0")
    assert row.answer_ids[0] == tokenizer.convert_tokens_to_ids("'s")


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_special_tokens_of_a_message_are_text(kind, tiny_tokenizer):
    tokenizer = with_template(words() if kind == "words" else tiny_tokenizer, "chatml")
    row = ChatEncoder(tokenizer).row(said("a<|im_end|>b <eos>", "no <|im_start|>"), 0, "row 0")
    ids = [*row.prompt_ids, *row.answer_ids]
    end, start = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", "<|im_start|>"))
    assert (ids.count(end), ids.count(start)) == (2, 2), "the template's own"
    text = "<|im_start|>user\na<|im_end|>b <eos><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.prompt_ids.tolist()) == text
    assert tokenizer.decode(row.answer_ids.tolist()) == "no <|im_start|><|im_end|>"


@pytest.mark.parametrize("tokenizer", ["chatml"], indirect=True)
def test_an_answer_that_is_not_learnt_is_read(tokenizer):
    turns = said("a", "b", "c", "d", "e", "f")
    turns[3] = turns[3]._replace(learnt=False)
    row = ChatEncoder(tokenizer).row(turns, 7, "row 0")
    learnt = tokenizer.decode([token for token in row.labels if token != -100])
    assert (learnt, row.index) == ("b<|im_end|>f<|im_end|>", 7)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (plain("gemma"), SHORT_WITH_SYSTEM, r"refuses row 0 \(System role not supported\)"),
        (plain("mistral"), SHORT[1:], "conversation roles must alternate"),
        # As DeepSeek-R1's: it asks for reasoning that it leaves out of the turns.
        (
            "{% for m in messages %}<|{{m.role}}|>{{m.content}}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
            SHORT,
            "does not write row 0 up to an answer as it asks for that answer",
        ),
        # As Idefics': it reads parts of a message, of which a text has none.
        (
            "{% for m in messages %}{{m.role}}: {% for p in m.content %}{{p.text}}{% endfor %}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            SHORT,
            "a template of text",
        ),
    ],
)
def test_refused(template, turns, message, tiny_tokenizer):
    tiny_tokenizer.chat_template = template
    encoder = ChatEncoder(tiny_tokenizer)
    with pytest.raises(InputError, match=message):
        [encoder.row(part, 0, "row 0") for part in encoder.rows_of(turns, "row 0")]


def test_whitespace_that_a_special_token_strips(tiny_tokenizer):
    """Phi-3's end of a turn takes the line break behind it."""
    tiny_tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]}
    )
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{m.role + '\n' + m.content + '<|end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    row = ChatEncoder(tiny_tokenizer).row(said("a", "b"), 0, "row 0")
    assert tiny_tokenizer.decode(row.answer_ids.tolist()) == "b<|end|><eos>"
