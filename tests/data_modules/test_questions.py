"""Questions of benchmarks: which are asked, what is left of long prompts, and their batches."""

import pytest
import torch
from tokenizers import processors

from app.evaluation.benchmark import BENCHMARK, Question
from app.utils.errors import InputError
from data_modules.benchmark_data import BenchmarkDataModule
from data_modules.encoding import TextEncoder
from data_modules.questions import BenchmarkQuestions, question_loaders
from data_modules.rows import TextRow
from tests.support.toy_benchmarks import Choosing, Writing


def prepare(*benchmarks, encoder, split="test", long_prompts="cut"):
    return BenchmarkQuestions(benchmarks, long_prompts).prepare(split, encoder)


def test_each_split_asks_its_number_of_questions(tiny_tokenizer):
    """Drawn in the same way for every seed of a run, a smaller draw being part of a larger one."""
    encoder = TextEncoder(tiny_tokenizer)
    benchmarks = (Writing(validation_size=8, limit=None), Choosing(validation_size=0, limit=5))
    (validated,) = prepare(*benchmarks, encoder=encoder, split="validation")
    writing, choosing = prepare(*benchmarks, encoder=encoder)
    keys = [question.key for question in Writing().load()]
    asked = [encoded.question.key for encoded in validated.questions]
    assert (len(asked), asked) == (8, sorted(asked, key=keys.index))
    assert [encoded.question.key for encoded in writing.questions] == keys
    assert (len(choosing.questions), writing.choice_ids) == (5, [])
    for ids, choice in zip(choosing.choice_ids, Choosing.choices, strict=True):
        assert tiny_tokenizer.decode(ids) == choice
    data = BenchmarkDataModule([Writing(validation_size=3)], seed=7)
    data.attach(tiny_tokenizer, is_encoder_decoder=False)
    (fewer,) = data.prepare_benchmarks("validation")
    assert {encoded.question.key for encoded in fewer.questions} < set(asked)


class OfRows(Writing):
    """A benchmark of one's own that asks the data module's rows."""

    asks_rows = True

    def take_rows(self, rows):
        self.rows = rows

    def load(self):
        return [Question(row.prompt, row.prompt, row.answer) for row in self.rows]


def test_a_benchmark_of_ones_own_asks_the_rows(tiny_tokenizer):
    rows = [TextRow(f"q{i}", "a") for i in range(4)]
    questions = BenchmarkQuestions([OfRows(limit=9)], "cut")
    (prepared,) = questions.prepare("test", TextEncoder(tiny_tokenizer), {"test": rows}.get)
    assert [encoded.question.key for encoded in prepared.questions] == ["q0", "q1", "q2", "q3"]
    before = prepared.questions[0].prompt_hash
    rows[0] = TextRow("q0", "corrected")
    (prepared,) = questions.prepare("test", TextEncoder(tiny_tokenizer), {"test": rows}.get)
    assert prepared.questions[0].prompt_hash != before


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_long_prompts_lose_their_beginning(is_encoder_decoder, tiny_tokenizer):
    encoder = TextEncoder(tiny_tokenizer, is_encoder_decoder, context_length=60)
    room = 60 if is_encoder_decoder else 54  # six are the answer's
    questions = BenchmarkQuestions([Writing()], "cut")
    with pytest.warns(UserWarning, match=r"prompts of writing lost their beginning.* 60 tokens"):
        (prepared,) = questions.prepare("test", encoder)
    lengths = [len(question.prompt) for question in Writing().load()]
    assert 0 < questions.num_cut["writing"] == sum(n > room for n in lengths) < len(lengths)
    for encoded in prepared.questions:
        whole = tiny_tokenizer(encoded.question.prompt)["input_ids"]
        assert list(encoded.prompt_ids) == whole[-room:]
    with pytest.raises(InputError, match=f"context has room for {room} beside the answer"):
        prepare(Writing(), encoder=encoder, long_prompts="refuse")


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_cut_keeps_what_it_begins_with(chat, tiny_tokenizer, monkeypatch):
    bos, unk = tiny_tokenizer.bos_token_id, tiny_tokenizer.unk_token_id
    tiny_tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <bos> $A <eos>", special_tokens=[("<unk>", unk), ("<bos>", bos), ("<eos>", 1)]
    )
    encoder = TextEncoder(tiny_tokenizer, chat_template=chat, context_length=60)
    monkeypatch.setattr("tests.support.toy_benchmarks.FILMS", ("x" * 99,))
    with pytest.warns(UserWarning, match="lost their beginning"):
        (prepared,) = prepare(Writing(), encoder=encoder)
    kept = [bos] if chat else [unk, bos]
    for question in prepared.questions:
        text = tiny_tokenizer(question.question.prompt, add_special_tokens=False)["input_ids"]
        assert list(question.prompt_ids) == kept + text[len(kept) - 54 :]


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        (Writing(limit=24), "24 questions of writing are asked for, which has 23"),
        (Writing(max_new_tokens=1024), "max_new_tokens=1024 of writing fill the model's context"),
        (Writing(broken=True), "toy_sandbox is absent"),
    ],
)
def test_what_cannot_be_prepared(benchmark, message, tiny_tokenizer):
    with pytest.raises(InputError, match=message):
        prepare(benchmark, encoder=TextEncoder(tiny_tokenizer, context_length=1024))


def test_a_benchmark_is_listed_once():
    with pytest.raises(InputError, match=r"--data.evals lists 'writing' twice"):
        BenchmarkQuestions([Writing(), Choosing(), Writing(size=3)], "cut")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_hold_every_question_once(world_size, tiny_tokenizer):
    prepared = prepare(Writing(), Choosing(), encoder=TextEncoder(tiny_tokenizer))
    for number, size in ((0, 23), (1, 17)):
        places = []
        for rank in range(world_size):
            batches = list(question_loaders(prepared, 4, rank, world_size)[number])
            assert {int(batch[BENCHMARK]) for batch in batches} == {number}
            places += torch.cat([batch["index"] for batch in batches]).tolist()
        assert sorted(place for place in places if place >= 0) == list(range(size))
        assert len(places) == -(-size // world_size) * world_size
        if number == 1 and world_size == 1:
            assert places == list(range(size)), "choices stay in the file's order"
