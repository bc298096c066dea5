"""Prompts and answers as token ids: what is read, supervised, cut and padded."""

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from app.utils.errors import InputError
from data_modules.encoding import TextEncoder
from data_modules.rows import PaddedRows, TextRow
from tests.support.tokenizers import WORDS

TURNS = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ROW = TextRow("Q: 1+1?\nA: ", "2\n#### 2")


def row(text, target=1):
    return TextRow(f"classify the text: {text}\nresult: ", WORDS[target], target)


def test_causal_batch_token_by_token(causal):
    rows, num_cut = TextEncoder(causal).rows([row("a good film"), row("bad", 0)], 128)
    batch = TextEncoder(causal).collate(rows)
    prompt = causal("classify the text: a good film\nresult:")["input_ids"]
    answer = causal(" positive")["input_ids"]
    assert len(answer) == 1, "one token with its leading space"
    assert batch["input_ids"][0].tolist() == prompt + answer + [causal.eos_token_id]
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + answer + [causal.eos_token_id]
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["target"].tolist(), batch["index"].tolist(), num_cut) == ([1, 0], [0, 1], 0)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_eos_is_learnt_although_it_is_the_padding_too(causal):
    assert causal.pad_token_id == causal.eos_token_id
    encoder = TextEncoder(causal)
    batch = encoder.collate(encoder.rows([row("a good film"), row("bad")], 128)[0])
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        last = int(mask.sum()) - 1
        assert labels[last] == causal.eos_token_id
        assert (labels[last + 1 :] == -100).all()
        assert int((labels != -100).sum()) == 2
    assert batch["attention_mask"][1].sum() < batch["attention_mask"].shape[1]


def test_encoder_decoder_batch_token_by_token(seq2seq):
    rows, _ = TextEncoder(seq2seq, True).rows([row("a good film"), row("bad", 0)], 128)
    batch = TextEncoder(seq2seq, True).collate(rows)
    mask = batch["attention_mask"][1].bool()
    prompt = batch["input_ids"][1][mask].tolist()
    assert prompt == seq2seq("classify the text: bad\nresult:").input_ids
    assert prompt[-1] == seq2seq.eos_token_id
    answer = seq2seq("negative", add_special_tokens=False)["input_ids"]
    labels = batch["labels"][1]
    assert labels[labels != -100].tolist() == [*answer, seq2seq.eos_token_id]
    (alone,), _ = TextEncoder(seq2seq).rows([row("bad", 0)], 128)
    assert alone.answer_ids.tolist() == [*answer, seq2seq.eos_token_id], "no second space"


@pytest.mark.parametrize(
    ("template", "bos", "prefix"),
    [
        (None, "<bos>", []),  # there is one, which the tokenizer does not add
        ("<bos> $A", "<bos>", ["<bos>"]),
        ("$A <eos>", "<bos>", []),
        ("<bos> $A <eos>", "<bos>", ["<bos>"]),
        ("<mask> <sop> $A", None, ["<mask>", "<sop>"]),  # GLM-4 has no BOS
        ("<sop> <sop> $A <eos> <mask>", None, ["<sop>", "<sop>"]),
    ],
)
def test_a_prompt_begins_with_all_that_the_tokenizer_adds(causal, template, bos, prefix):
    core = Tokenizer.from_str(causal.backend_tokenizer.to_str())
    core.add_special_tokens(["<bos>", "<mask>", "<sop>"])
    ids = {token: core.token_to_id(token) for token in ("<bos>", "<mask>", "<sop>", "<eos>")}
    if template is not None:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(ids.items())
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<eos>")
    encoder = TextEncoder(tokenizer)
    long = row("good " * 50)
    (encoded, cut), _ = encoder.rows([row("bad"), long], 40)
    text = tokenizer("classify the text: bad\nresult:", add_special_tokens=False)["input_ids"]
    assert encoded.prompt_ids.tolist() == [ids[token] for token in prefix] + text
    assert encoded.answer_ids.tolist()[-1] == ids["<eos>"]
    assert not set(encoded.answer_ids[:-1]) & set(ids.values())
    for special in (cut.prompt_ids.tolist(), *encoder.prompts([long.prompt])):
        marks = [token for token in special if token in ids.values()]
        assert marks == special[: len(marks)] == [ids[token] for token in prefix]
    seq2seq = TextEncoder(tokenizer, is_encoder_decoder=True)
    assert seq2seq.prompts([long.prompt]) == tokenizer([long.prompt.rstrip()])["input_ids"]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_long_prompt_is_cut_in_its_text_only(causal, seq2seq, is_encoder_decoder):
    tokenizer = seq2seq if is_encoder_decoder else causal
    long, short = row("good " * 200), row("bad")
    limit = 40
    rows, num_cut = TextEncoder(tokenizer, is_encoder_decoder).rows([long, short], limit)
    assert num_cut == 1
    num_used = len(rows[0].prompt_ids) + (0 if is_encoder_decoder else len(rows[0].answer_ids))
    assert limit - 6 <= num_used <= limit
    text = tokenizer.decode(rows[0].prompt_ids, skip_special_tokens=True)
    assert text.replace("\n", " ").endswith("good result:")
    assert text.startswith("classify the text")
    whole = TextEncoder(tokenizer, is_encoder_decoder).rows([long], 10_000)[0][0]
    assert rows[0].answer_ids == whole.answer_ids
    if is_encoder_decoder:
        assert rows[0].prompt_ids[-1] == tokenizer.eos_token_id
    else:
        (cut,), num_cut = TextEncoder(causal).rows([row("é…😀" * 50)], 60)
        assert num_cut == 1
        assert "�" not in causal.decode(cut.prompt_ids), "characters stay whole"


def test_rows_that_cannot_be_encoded(causal):
    with pytest.raises(InputError, match=r"data.max_length=5 .*row 0 of train"):
        TextEncoder(causal).rows([row("good")], 5, "train")
    for answer in ("", "  "):
        with pytest.raises(InputError, match=r"row 1 of data has the answer"):
            TextEncoder(causal).rows([row("good"), TextRow("a\nresult: ", answer, 0)], 128)
    silent = PreTrainedTokenizerFast(tokenizer_object=causal.backend_tokenizer)
    with pytest.raises(InputError, match="eos_token"):
        TextEncoder(silent).rows([row("good")], 128)


@pytest.fixture
def turns(tiny_tokenizer):
    """A tokenizer whose template writes BOS itself and ends a turn with another token than EOS."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tiny_tokenizer.chat_template = TURNS
    return tiny_tokenizer


def test_a_row_token_by_token(turns):
    (row,), _ = TextEncoder(turns, chat_template=True).rows([ROW], 200)
    text = "<bos><|start|>user\nQ: 1+1?\nA:<|end|>\n<|start|>assistant\n"
    assert turns.decode(row.prompt_ids.tolist()) == text
    assert turns.decode(row.answer_ids.tolist()) == "2\n#### 2<|end|><eos>"
    special = [turns.convert_tokens_to_ids(t) for t in ("<bos>", "<|start|>", "<|end|>")]
    counts = [row.prompt_ids.tolist().count(token) for token in special]
    assert counts == [1, 2, 1], "parsed as tokens, and BOS once"
    (asked,) = TextEncoder(turns, chat_template=True).prompts([ROW.prompt])
    assert asked == row.prompt_ids.tolist()


def test_bos_that_the_tokenizer_adds_is_not_doubled(turns):
    turns.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", turns.bos_token_id)]
    )
    assert turns("a")["input_ids"][0] == turns.bos_token_id
    for chat in (False, True):
        (ids,) = TextEncoder(turns, chat_template=chat).prompts(["a"])
        assert ids.count(turns.bos_token_id) == 1
        assert ids[0] == turns.bos_token_id


def test_a_long_prompt_is_cut_inside_its_turn(turns):
    long = TextRow("classify: " + "x " * 100 + "\nresult: ", "good")
    (row,), num_cut = TextEncoder(turns, chat_template=True).rows([long], 80)
    text = turns.decode(row.prompt_ids.tolist())
    assert num_cut == 1
    assert 75 <= len(row) <= 80
    assert text.startswith("<bos><|start|>user\nclassify: x x")
    assert text.endswith("x\nresult:<|end|>\n<|start|>assistant\n")


def test_rows_too_long_are_dropped_where_asked(turns):
    rows = [TextRow("x" * size, "good") for size in (10, 40, 20)]
    encoded, num_dropped = TextEncoder(turns).rows(rows, 30, too_long="drop")
    assert ([row.index for row in encoded], num_dropped) == ([0, 2], 1)
    assert [len(row.prompt_ids) for row in encoded] == [10, 20]
    chat = TextEncoder(turns, chat_template=True)
    edge = max(len(row) for row in chat.rows(rows, 999)[0])
    assert chat.rows(rows, edge, too_long="drop")[1] == 0
    assert chat.rows(rows, edge - 1, too_long="drop")[1] == 1


def test_a_padding_row_is_learnt_and_counted_nowhere(causal):
    encoder = TextEncoder(causal)
    rows = encoder.rows([row("a good film"), row("bad"), row("it is good")], 128)[0]
    padded = PaddedRows(rows)
    batch = encoder.collate([padded[0], padded[-1]])
    assert (batch["labels"][0] != -100).any()
    assert (batch["labels"][1] == -100).all()
    assert batch["index"].tolist()[1] == batch["target"].tolist()[1] == -1
    assert len(padded[-1]) == min(map(len, rows))


@pytest.mark.parametrize(
    ("end", "learnt"),
    [
        ("<|end|>\n", "<|end|><eos>"),
        *((end, "<eos>") for end in ("<eos>\n", " <eos>", "\n###", "")),
    ],
)
def test_what_ends_an_answer(turns, end, learnt):
    turns.chat_template = TURNS.replace("<|end|>\n", end)
    assert turns.decode(TextEncoder(turns, chat_template=True).answer_end()) == learnt
    assert TextEncoder(turns).answer_end() == [turns.eos_token_id]


def test_a_space_before_an_answer_only_inside_a_line(turns):
    line = TextEncoder(turns).answer_prefix
    assert line("A: ") == line("A:") == " "
    assert line("### Response:\n") == line("a\n ") == ""
    assert TextEncoder(turns, chat_template=True).answer_prefix("A: ") == ""
    assert TextEncoder(turns, is_encoder_decoder=True).answer_prefix() == ""


def test_special_tokens_in_the_data_are_text(tiny_tokenizer, turns):
    marked = TextRow("say <eos> to", "<bos> no<eos>")
    encoder = TextEncoder(tiny_tokenizer)
    (read, _), _ = encoder.rows([marked, row("bad")], 99)
    with pytest.warns(UserWarning, match="1 of 2 train rows have the characters of special"):
        encoder.warn_of_special_tokens({"train": [marked, row("bad")]})
    letters = tiny_tokenizer.convert_tokens_to_ids(list("say<eos>to"))
    kept = [
        token for token in read.prompt_ids if token != tiny_tokenizer.convert_tokens_to_ids("Ġ")
    ]
    assert kept == letters
    assert tiny_tokenizer.decode(read.answer_ids.tolist()) == " <bos> no<eos><eos>"
    assert read.answer_ids.tolist().count(tiny_tokenizer.eos_token_id) == 1
    chat = TextEncoder(turns, chat_template=True)
    begin, end = turns.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    plain, tricky = chat.prompts(["say it", "say <|end|>it"])
    assert [ids.count(token) for ids in (plain, tricky) for token in (begin, end)] == [2, 1, 2, 1]
    assert turns.decode(tricky) == turns.decode(plain).replace("it", "<|end|>it")
    (alone,) = chat.prompts(["<|end|>"])
    letters = turns.convert_tokens_to_ids(list("<|end|>"))
    at = alone.index(end) - len(letters)
    assert alone[at : at + len(letters)] == letters


def test_an_empty_prompt_is_named(tiny_tokenizer):
    with pytest.raises(InputError, match="row 0 of data has an empty prompt: expected text"):
        TextEncoder(tiny_tokenizer).rows([TextRow("", "yes")], 99)


def test_a_tokenizer_without_a_template(tiny_tokenizer):
    chat = TextEncoder(tiny_tokenizer, chat_template=True)
    for encode in (lambda: chat.prompts(["a"]), lambda: chat.rows([ROW], 99)):
        with pytest.raises(InputError, match=r"data.chat_template=true.* has no chat template"):
            encode()


@pytest.mark.smollm2
def test_the_real_template(smollm2_dir):
    """SmolLM2-Instruct: BOS is what starts a turn, EOS what ends it, and a system's turn comes first."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    (row,), _ = TextEncoder(tokenizer, chat_template=True).rows([ROW], 999)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert tokenizer.decode(row.prompt_ids.tolist()) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    learnt = tokenizer.decode(row.answer_ids.tolist())
    assert learnt == "2\n#### 2<|im_end|>"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q: 1+1?\nA:"}, {"role": "assistant", "content": "2\n#### 2"}],
        return_dict=False,
    )
    ids = [*row.prompt_ids, *tokenizer(learnt)["input_ids"]]
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]) == "\n"
