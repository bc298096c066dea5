"""Conversations of one's own: against the instructions of one turn, packed, kept, too long, and refused."""

import itertools
import json

import pytest
import torch

from app.utils.errors import InputError
from data_modules import token_cache
from data_modules.chat import ChatDataModule
from data_modules.instructions import InstructionDataModule, instruction_prompt
from tests.support.matrix import CHAT_TEMPLATE
from tests.support.paths import DATA, needs_data
from tests.support.rows import attached, from_file, write_jsonl

REWRITING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %} (last){% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chatty(tiny_tokenizer):
    """Return a tokenizer with a chat template."""
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    return tiny_tokenizer


def talk(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


LONG = [talk(f"q{i}", f"a{i}", f"why {i}?", "b" * i) for i in range(1, 9)]


def learnt(data, split="train"):
    """Return what is supervised of each row, the stretches between two spaces."""
    decode = data.encoder.tokenizer.decode
    return [
        decode([token if token != -100 else 0 for token in row.labels]).replace("<pad>", "")
        for row in data.encoded(split)
    ]


@needs_data("code")
def test_one_turn_is_what_an_instruction_is(chatty, tmp_path):
    """The same tokens as InstructionDataModule's of the published rows, in its chat template."""
    path = DATA / "code" / "code_alpaca_2k.json"
    published = [row for row in json.loads(path.read_bytes()) if row["output"].strip()][:300]
    same = attached(InstructionDataModule, chatty, path=str(path), chat_template=True)
    prompts = [instruction_prompt(row["instruction"], row["input"]) for row in published]
    rows = [talk(p, row["output"]) for p, row in zip(prompts, published, strict=True)]
    data = from_file(ChatDataModule, chatty, tmp_path, rows, validation_size=0)
    known = {tuple(row.prompt_ids): row for row in same.encoded("train")}
    compared = 0
    for row in data.encoded("train"):
        # That data module drops spaces at the end of a prompt.
        other = known.get(tuple(row.prompt_ids))
        if other is not None:
            assert (row.answer_ids, row.read_only) == (other.answer_ids, ())
            compared += 1
    assert compared > 250


def test_every_answer_of_a_conversation_is_learnt(chatty, tmp_path):
    data = from_file(ChatDataModule, chatty, tmp_path, LONG, validation_size=0)
    assert learnt(data) == [f"a{i}<eos>{'b' * i}<eos>" for i in range(1, 9)]
    (batch,) = data.train_dataloader()
    assert (batch["labels"] != -100).sum() == sum(
        row.num_supervised for row in data.encoded("train")
    )
    whole = from_file(
        ChatDataModule, chatty, tmp_path, LONG, validation_size=0, completion_only_loss=False
    )
    text = "user: q3<eos>assistant: a3<eos>user: why 3?<eos>assistant: bbb<eos>"
    assert learnt(whole)[2] == text[1:], "all but the first token"


def test_packed_conversations_have_the_same_labels(chatty, tmp_path):
    options = {"validation_size": 0, "batch_size": 8}
    data = from_file(ChatDataModule, chatty, tmp_path, LONG, **options)
    packed = from_file(
        ChatDataModule, chatty, tmp_path, LONG, **options, packing=True, max_length=200
    )
    (alone,), (together,) = data.train_dataloader(), packed.train_dataloader()
    assert len(together["labels"]) < len(alone["labels"]) == 8

    def examples(batch):
        ids, labels = batch["input_ids"], batch["labels"]
        if "position_ids" not in batch:
            masks = batch["attention_mask"].bool()
            return {
                (tuple(row[mask].tolist()), tuple(label[mask].tolist()))
                for row, label, mask in zip(ids, labels, masks, strict=True)
            }
        found = set()
        for row, label, positions in zip(ids, labels, batch["position_ids"], strict=True):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(row)]
            for begin, end in itertools.pairwise(starts):
                found.add((tuple(row[begin:end].tolist()), tuple(label[begin:end].tolist())))
        return found

    padding = {pair for pair in examples(together) if len(pair[0]) == 1}
    assert examples(alone) == examples(together) - padding


def test_tokens_that_are_kept_are_read_back(chatty, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_ONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "CACHED_FROM", 0)
    first, second = (
        from_file(ChatDataModule, chatty, tmp_path, LONG, validation_size=0).encoded("train")
        for _ in range(2)
    )
    files = (tmp_path / "cache" / "tokens").glob
    assert len(list(files("*.safetensors"))) == 1
    assert second == first
    assert first[0].read_only
    # Another template of the same question is another file.
    chatty.chat_template = CHAT_TEMPLATE.replace("<eos>", "<bos><eos>")
    from_file(ChatDataModule, chatty, tmp_path, LONG, validation_size=0).encoded("train")
    assert len(list(files("*.safetensors"))) == 2
    # And so is another second question of the same first one and the same answers.
    rows = [talk(f"q{i}", f"a{i}", f"who {i}?", "b" * i) for i in range(1, 9)]
    from_file(ChatDataModule, chatty, tmp_path, rows, validation_size=0).encoded("train")
    assert len(list(files("*.safetensors"))) == 3


def test_long_conversations_are_left_out_and_counted(chatty, tmp_path):
    rows = [talk("q", "a"), talk("q" * 99, "a"), talk("q", "a" * 99), talk("q", "b")]
    data = from_file(ChatDataModule, chatty, tmp_path, rows, max_length=60, validation_size=0)
    assert learnt(data) == ["a<eos>", "b<eos>"]
    assert data.describe()["dropped_rows"]["too_long"] == 2


def test_a_template_that_rewrites_turns_has_a_row_for_each_answer(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = REWRITING
    data = from_file(ChatDataModule, tiny_tokenizer, tmp_path, LONG, validation_size=0)
    with pytest.warns(UserWarning, match="rewrites earlier turns: 8 conversations are 16 rows"):
        rows = learnt(data)
    assert rows[:4] == ["a1 (last)<eos>", "b (last)<eos>", "a2 (last)<eos>", "bb (last)<eos>"]
    read = tiny_tokenizer.decode(data.encoded("train")[1].prompt_ids.tolist())
    assert read == "user: q1<eos>assistant: a1<eos>user: why 1?<eos>assistant: "
    # With another model, the conversations are whole again.
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    data.attach(tiny_tokenizer, False, 1024)
    assert len(data.rows("train")) == 8


def test_validation_rows_do_not_begin_as_training_rows_do(chatty, tmp_path):
    rows = [talk(f"q{i % 5}", f"a{i}") for i in range(20)]
    data = from_file(ChatDataModule, chatty, tmp_path, rows, validation_size=4)
    train, validation = ({row.prompt for row in data.rows(s)} for s in ("train", "validation"))
    assert len(validation) == 1
    assert not train & validation


def test_a_tenth_validates_where_nothing_else_is_asked(chatty, tmp_path):
    rows = [talk(f"q{i}", f"a{i}") for i in range(29)]
    data = from_file(ChatDataModule, chatty, tmp_path, rows, validation_size=None)
    assert [len(data.rows(split)) for split in ("train", "validation")] == [27, 2]


def test_a_file_that_validates(chatty, tmp_path):
    other = write_jsonl(tmp_path / "held_out.jsonl", talk("q", "held"), talk("q1", "a1"))
    rows = [talk(f"q{i}", f"a{i}") for i in range(20)]
    data = from_file(
        ChatDataModule, chatty, tmp_path, rows, validation_size=None, validation_file=other
    )
    with pytest.warns(UserWarning, match="1 of 2 validation rows of .* are training rows, too"):
        assert learnt(data, "validation") == ["held<eos>", "a1<eos>"]
    assert len(learnt(data)) == 20
    (tmp_path / "held_out.jsonl").write_text("{}\n")
    data = from_file(
        ChatDataModule, chatty, tmp_path, rows, validation_size=None, validation_file=other
    )
    with pytest.raises(InputError, match=r"held_out.jsonl .*change --data.validation_file"):
        data.rows("train")
    with pytest.raises(InputError, match=r"validation_size=3 are given: expected one of them"):
        ChatDataModule("x.jsonl", validation_size=3, validation_file=other)


def test_models_that_cannot_chat_are_refused(tiny_tokenizer, chatty, tmp_path):
    data = from_file(ChatDataModule, chatty, tmp_path, LONG)
    data.attach(chatty, is_encoder_decoder=True)
    with pytest.raises(InputError, match=r"model.name is a sequence-to-sequence model: expected a"):
        data.rows("train")
    chatty.chat_template = None
    data = from_file(ChatDataModule, chatty, tmp_path, LONG)
    with pytest.raises(InputError, match=r"model.name has no chat template: expected a causal"):
        data.rows("train")


def test_a_conversation_that_the_template_refuses_is_named(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    row = {"messages": [{"role": "system", "content": "s"}, *talk("why?", "so")["messages"]]}
    data = from_file(ChatDataModule, tiny_tokenizer, tmp_path, [talk("q", "a"), row])
    with pytest.raises(InputError, match=r"refuses the conversation .* 'why\?' \(no system\)"):
        data.rows("train")
