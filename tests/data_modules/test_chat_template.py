"""Prompts in a chat template: the same ids in training and evaluation, each turn with its own end."""

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from app.utils.errors import InputError
from data_modules.encoding import TextRow, answer_end, answer_prefix, encode, encode_prompts
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.text import TextDataModule

TURNS = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ROW = TextRow("Q: 1+1?\nA: ", "2\n#### 2")


@pytest.fixture
def turns(tiny_tokenizer):
    """A tokenizer whose template writes BOS itself and ends a turn with another token than EOS."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tiny_tokenizer.chat_template = TURNS
    return tiny_tokenizer


def test_a_row_token_by_token(turns):
    (row,), _ = encode([ROW], turns, False, 200, chat_template=True)
    text = "<bos><|start|>user\nQ: 1+1?\nA:<|end|>\n<|start|>assistant\n"
    assert turns.decode(row.prompt_ids.tolist()) == text
    assert turns.decode(row.answer_ids.tolist()) == "2\n#### 2<|end|><eos>"
    special = [turns.convert_tokens_to_ids(t) for t in ("<bos>", "<|start|>", "<|end|>")]
    counts = [row.prompt_ids.tolist().count(token) for token in special]
    assert counts == [1, 2, 1], "parsed as tokens, and BOS once"
    (asked,) = encode_prompts([ROW.prompt], turns, False, True)
    assert asked == row.prompt_ids.tolist()


def test_bos_that_the_tokenizer_adds_is_not_doubled(turns):
    turns.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", turns.bos_token_id)]
    )
    assert turns("a")["input_ids"][0] == turns.bos_token_id
    for chat in (False, True):
        (ids,) = encode_prompts(["a"], turns, False, chat)
        assert ids.count(turns.bos_token_id) == 1
        assert ids[0] == turns.bos_token_id


@pytest.mark.parametrize(
    ("end", "learnt"),
    [
        ("<|end|>\n", "<|end|><eos>"),
        ("<eos>\n", "<eos>"),
        (" <eos>", "<eos>"),
        ("\n###", "<eos>"),
        ("", "<eos>"),
    ],
)
def test_what_ends_an_answer(turns, end, learnt):
    turns.chat_template = TURNS.replace("<|end|>\n", end)
    assert turns.decode(answer_end(turns, True)) == learnt
    assert answer_end(turns, False) == [turns.eos_token_id]


def test_a_long_prompt_is_cut_inside_its_turn(turns):
    long = TextRow("classify: " + "x " * 100 + "\nresult: ", "good")
    (row,), num_cut = encode([long], turns, False, 80, chat_template=True)
    text = turns.decode(row.prompt_ids.tolist())
    assert num_cut == 1
    assert 75 <= len(row) <= 80
    assert text.startswith("<bos><|start|>user\nclassify: x x")
    assert text.endswith("x\nresult:<|end|>\n<|start|>assistant\n")


def test_rows_too_long_are_dropped_where_asked(turns):
    rows = [TextRow("x" * size, "good") for size in (10, 40, 20)]
    encoded, num_dropped = encode(rows, turns, False, 30, too_long="drop")
    assert ([row.index for row in encoded], num_dropped) == ([0, 2], 1)
    assert [len(row.prompt_ids) for row in encoded] == [10, 20]
    lengths = [len(row) for row in encode(rows, turns, False, 999, chat_template=True)[0]]
    edge = max(lengths)
    assert encode(rows, turns, False, edge, chat_template=True, too_long="drop")[1] == 0
    assert encode(rows, turns, False, edge - 1, chat_template=True, too_long="drop")[1] == 1


def test_a_space_before_an_answer_only_inside_a_line(turns):
    form = (turns, False, False)
    assert answer_prefix(*form, "A: ") == answer_prefix(*form, "A:") == " "
    assert answer_prefix(*form, "### Response:\n") == answer_prefix(*form, "a\n ") == ""
    assert answer_prefix(turns, False, True, "A: ") == answer_prefix(turns, True) == ""


class Sentences(TextDataModule):
    """Two classes, in memory."""

    task_name = "sentences"
    label_words = ("bad", "good")

    def load(self):
        rows = [TextRow(f"{i}\nresult: ", self.label_words[i % 2], i % 2) for i in range(4)]
        return {"train": rows, "validation": rows, "test": rows}


@pytest.mark.parametrize("chat", [False, True])
def test_label_words_are_scored_where_they_stand(turns, chat):
    turns.add_tokens([" bad", " good", "bad", "good"])
    data = Sentences(chat_template=chat)
    data.attach(turns, is_encoder_decoder=False)
    firsts = {row.target: row.answer_ids[0] for row in data.encoded("train")}
    assert data.label_token_ids() == [firsts[0], firsts[1]]
    assert turns.decode(firsts[1]) == ("good" if chat else " good")


def test_a_tokenizer_without_a_template(tiny_tokenizer):
    for ask in (
        lambda: encode_prompts(["a"], tiny_tokenizer, False, True),
        lambda: encode([ROW], tiny_tokenizer, False, 99, chat_template=True),
    ):
        with pytest.raises(InputError, match=r"data.chat_template=true.* has no chat template"):
            ask()


@pytest.mark.smollm2
def test_the_real_template(smollm2_dir, tmp_path):
    """SmolLM2-Instruct: BOS is what starts a turn, EOS what ends it, and a system's turn comes first."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    file = tmp_path / "rows.jsonl"
    data = Gsm8kDataModule(str(file), chat_template=True, validation_size=1)
    file.write_text(
        '{"question": "1+1?", "answer": "2\\n#### 2"}\n{"question": "x", "answer": "y"}\n'
    )
    data.attach(tokenizer, is_encoder_decoder=False)
    rows = [*data.encoded("train"), *data.encoded("validation")]
    texts = [
        (tokenizer.decode(r.prompt_ids.tolist()), tokenizer.decode(r.answer_ids.tolist()))
        for r in rows
    ]
    read, learnt = next(pair for pair in texts if "1+1" in pair[0])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert read == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert learnt == "2\n#### 2<|im_end|>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q: 1+1?\nA:"}, {"role": "assistant", "content": "2\n#### 2"}],
        return_dict=False,
    )
    ids = [*rows[[t[0] for t in texts].index(read)].prompt_ids, *tokenizer(learnt)["input_ids"]]
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n"
