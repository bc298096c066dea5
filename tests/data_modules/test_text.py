"""Encoding, order and initialisation rows of the shared text data module."""

import math

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from app.utils.errors import InputError
from data_modules.encoding import PaddedRows, TextRow, collate, encode
from data_modules.sampling import PADDING, LengthGroupedSampler, longest_first, split_off
from data_modules.text import TextDataModule

WORDS = ("negative", "positive")
TEXTS = [
    "a good film",
    "bad",
    "it is good , it is bad",
    "the film is a good film it is a good film",
]
CORPUS = [f"classify the text: {text}\nresult: {word}" for text in TEXTS for word in WORDS] * 20


@pytest.fixture(scope="module")
def causal():
    """Byte-level BPE as GPT-2 and SmolLM2 have it; pad is eos; nothing is added unasked."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def seq2seq():
    """Pieces that mark the start of a word, and an EOS that the tokenizer adds, as T5 has it."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    core.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


class Rows(TextDataModule):
    """A source in memory: 40 rows of four lengths."""

    task_name = "rows"
    label_words = WORDS

    def load(self):
        rows = [row(f"{number} {TEXTS[number % 4]}", number % 2) for number in range(40)]
        return {"train": rows[:30], "validation": rows[30:35], "test": rows[35:]}


def row(text, target=1):
    return TextRow(f"classify the text: {text}\nresult: ", WORDS[target], target)


def attached(tokenizer, is_encoder_decoder=False, **options):
    data = Rows(batch_size=4, eval_batch_size=2, **options)
    data.attach(tokenizer, is_encoder_decoder)
    return data


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(lists):
    return [element for part in lists for element in part]


def test_causal_batch_token_by_token(causal):
    rows, num_cut = encode([row("a good film"), row("bad", 0)], causal, False, 128)
    batch = collate(rows, causal.pad_token_id, False)
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
    batch = collate(encode([row("a good film"), row("bad")], causal, False, 128)[0], 0, False)
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        last = int(mask.sum()) - 1
        assert labels[last] == causal.eos_token_id
        assert (labels[last + 1 :] == -100).all()
        assert int((labels != -100).sum()) == 2
    assert batch["attention_mask"][1].sum() < batch["attention_mask"].shape[1]


def test_encoder_decoder_batch_token_by_token(seq2seq):
    rows, _ = encode([row("a good film"), row("bad", 0)], seq2seq, True, 128)
    batch = collate(rows, seq2seq.pad_token_id, True)
    mask = batch["attention_mask"][1].bool()
    assert (
        batch["input_ids"][1][mask].tolist() == seq2seq("classify the text: bad\nresult:").input_ids
    )
    assert batch["input_ids"][1][mask][-1] == seq2seq.eos_token_id
    answer = seq2seq("negative", add_special_tokens=False)["input_ids"]
    labels = batch["labels"][1]
    assert labels[labels != -100].tolist() == [*answer, seq2seq.eos_token_id]


def test_a_tokenizer_that_marks_words_gets_no_second_space(seq2seq):
    rows, _ = encode([row("bad")], seq2seq, False, 128)
    answer = seq2seq("positive", add_special_tokens=False)["input_ids"]
    assert rows[0].answer_ids.tolist() == [*answer, seq2seq.eos_token_id]


def test_bos_only_where_the_tokenizer_adds_it(causal, seq2seq):
    core = Tokenizer.from_str(causal.backend_tokenizer.to_str())
    core.add_special_tokens(["<bos>"])
    bos = core.token_to_id("<bos>")
    silent = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    assert bos not in encode([row("bad")], silent, False, 128)[0][0].prompt_ids
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    adding = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    encoded = encode([row("bad")], adding, False, 128)[0][0]
    assert encoded.prompt_ids[0] == bos
    assert bos not in [*encoded.prompt_ids[1:], *encoded.answer_ids]


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_long_prompt_is_cut_in_its_text_only(causal, seq2seq, is_encoder_decoder):
    tokenizer = seq2seq if is_encoder_decoder else causal
    long, short = row("good " * 200), row("bad")
    limit = 40
    rows, num_cut = encode([long, short], tokenizer, is_encoder_decoder, limit)
    assert num_cut == 1
    num_used = len(rows[0].prompt_ids) + (0 if is_encoder_decoder else len(rows[0].answer_ids))
    assert limit - 6 <= num_used <= limit
    text = tokenizer.decode(rows[0].prompt_ids, skip_special_tokens=True)
    assert text.replace("\n", " ").endswith("good result:")
    assert text.startswith("classify the text")
    whole = encode([long], tokenizer, is_encoder_decoder, 10_000)[0][0]
    assert rows[0].answer_ids == whole.answer_ids
    if is_encoder_decoder:
        assert rows[0].prompt_ids[-1] == tokenizer.eos_token_id


def test_cutting_keeps_characters_whole(causal):
    rows, num_cut = encode([row("é…😀" * 50)], causal, False, 60)
    assert num_cut == 1
    assert "�" not in causal.decode(rows[0].prompt_ids)


def test_no_room_names_the_setting(causal):
    with pytest.raises(InputError, match=r"data.max_length=5 .*row 0 of train"):
        encode([row("good")], causal, False, 5, "train")


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_is_refused(causal, answer):
    with pytest.raises(InputError, match=r"row 1 of data has the answer"):
        encode([row("good"), TextRow("a\nresult: ", answer, 0)], causal, False, 128)


def test_a_tokenizer_without_eos_is_refused(causal):
    silent = PreTrainedTokenizerFast(tokenizer_object=causal.backend_tokenizer)
    with pytest.raises(InputError, match="eos_token"):
        encode([row("good")], silent, False, 128)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 33, 100, 101])
def test_every_row_once_an_epoch(num_rows):
    lengths = [(7 * i) % 13 + 1 for i in range(num_rows)]
    for shuffle in (True, False):
        sampler = LengthGroupedSampler(lengths, 4, shuffle)
        assert sorted(sampler) == list(range(num_rows))
        assert len(sampler) == num_rows
        assert lengths[next(iter(sampler))] == max(lengths)


def test_order_follows_seed_and_epoch():
    lengths = [(7 * i) % 13 + 1 for i in range(100)]

    def order(seed, epoch):
        sampler = LengthGroupedSampler(lengths, 4, True, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_batches_are_of_similar_length_but_not_sorted():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGroupedSampler(lengths, 10, True))
    batches = [[lengths[i] for i in order[start : start + 10]] for start in range(0, 1000, 10)]
    assert sum(max(batch) - min(batch) for batch in batches) / 100 < 20
    means = torch.tensor([sum(batch) / 10 for batch in batches])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(100.0)]))[0, 1]) < 0.3


@pytest.mark.parametrize("num_rows", [1, 5, 30])
def test_processes_share_the_order_of_one(num_rows):
    lengths = [(7 * i) % 13 + 1 for i in range(num_rows)]
    shards = [list(LengthGroupedSampler(lengths, 2, True, 0, rank, 3)) for rank in range(3)]
    alone = list(LengthGroupedSampler(lengths, 6, True, 0))
    merged = [row for step in zip(*shards, strict=True) for row in step]
    assert merged == alone + [PADDING] * (-num_rows % 3)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
def test_order_goes_on_behind_the_rows_that_are_done(rank, world_size):
    lengths = [(7 * i) % 13 + 1 for i in range(50)]
    whole = list(LengthGroupedSampler(lengths, 6, True, 0))
    sampler = LengthGroupedSampler(lengths, 2, True, 0, rank, world_size, group_size=6, done=12)
    rest = whole[12:] + [PADDING] * (-38 % world_size)
    assert list(sampler) == rest[rank::world_size]
    assert len(list(sampler)) == math.ceil(50 / world_size)


def test_a_padding_row_is_learnt_and_counted_nowhere(causal):
    rows = attached(causal).encoded("train")[:3]
    padded = PaddedRows(rows)
    batch = collate([padded[0], padded[PADDING]], 0, False)
    assert (batch["labels"][0] != -100).any()
    assert (batch["labels"][1] == -100).all()
    assert batch["index"].tolist()[1] == batch["target"].tolist()[1] == -1
    assert len(padded[PADDING]) == min(map(len, rows))


def test_position_in_the_order_is_kept_and_checked(causal):
    data = attached(causal)
    data.batch_size = 4
    assert data.state_dict() == {}
    data.load_state_dict({"epoch": 2, "done": 8, "group_size": 8})
    sampler = data.train_dataloader().sampler
    wanted = LengthGroupedSampler([len(r) for r in data.encoded("train")], 8, True, data.seed)
    wanted.set_epoch(2)
    assert list(sampler) == list(wanted)[8:]
    data.batch_size = 3
    with pytest.raises(InputError, match=r"8 rows.*batches of 3 .*data.batch_size"):
        data.load_state_dict({"epoch": 2, "done": 8, "group_size": 8})


def test_evaluation_keeps_every_row_in_a_fixed_order(causal):
    data = attached(causal)
    for loader, num_rows in ((data.val_dataloader()[0], 5), (data.test_dataloader()[0], 5)):
        seen = indices(loader)
        assert [len(part) for part in seen] == [2, 2, 1]
        assert sorted(flat(seen)) == list(range(num_rows))
        assert seen == indices(loader)
    lengths = [int(n) for batch in data.val_dataloader()[0] for n in batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True)


def test_worker_processes_give_the_same_batches(causal):
    assert indices(attached(causal, num_workers=1).val_dataloader()[0]) == indices(
        attached(causal).val_dataloader()[0]
    )


class Recorder(pl.LightningModule):
    """Offers what a data module asks of a model and notes the rows it meets."""

    is_encoder_decoder = False
    context_length = None

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_under_a_trainer_each_epoch_has_its_own_order(causal, tmp_path):
    module = Recorder(causal)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, datamodule=Rows(batch_size=4))
    first, second = (flat(rows for at, rows in module.seen if at == epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def test_gradient_rows_do_not_depend_on_batches_or_processes(causal):
    data = attached(causal)
    reference = sorted(flat(indices(data.gradient_batches(13, 13))))
    assert len(set(reference)) == 13
    for micro_batch_size in (1, 4, 8):
        batches = data.gradient_batches(13, micro_batch_size)
        assert sorted(flat(indices(batches))) == reference
        assert max(len(batch["index"]) for batch in batches) == micro_batch_size
    for world_size in (2, 3):
        shares = [
            flat(indices(data.gradient_batches(13, 4, rank, world_size)))
            for rank in range(world_size)
        ]
        assert sorted(row for row in flat(shares) if row >= 0) == reference
        assert {len(share) for share in shares} == {math.ceil(13 / world_size)}


def test_gradient_rows_follow_the_seed(causal):
    def rows(**options):
        return sorted(flat(indices(attached(causal, **options).gradient_batches(8, 4))))

    assert rows() == rows()
    assert rows(seed=1) != rows()
    assert rows() != sorted(next(iter(attached(causal).train_dataloader()))["index"].tolist())


@pytest.mark.parametrize("num_samples", [0, 31])
def test_gradient_rows_out_of_range(causal, num_samples):
    with pytest.raises(InputError, match=f"{num_samples} initialisation samples from 30"):
        attached(causal).gradient_batches(num_samples, 4)


def test_a_smaller_training_subset_is_part_of_a_larger_one():
    small, large = (set(Rows(train_size=size).rows("train")) for size in (5, 20))
    assert len(small) == 5
    assert small < large
    assert set(Rows(train_size=5, seed=1).rows("train")) != small
    with pytest.raises(InputError, match=r"data.train_size=31: expected 1 to 30"):
        Rows(train_size=31).rows("train")


def test_split_keeps_equal_prompts_together():
    rows = [row(str(number // 2), number % 2) for number in range(40)]
    rest, aside = split_off(rows, 10, "data.validation_size")
    assert (len(rest), len(aside)) == (30, 10)
    assert not {r.prompt for r in rest} & {r.prompt for r in aside}
    with pytest.raises(InputError, match=r"data.validation_size=40 of 40 rows"):
        split_off(rows, 40, "data.validation_size")


def test_cut_prompts_are_reported_and_described(causal):
    data = attached(causal, max_length=18)
    with pytest.warns(UserWarning, match=r"of 30 prompts of rows train were cut .*max_length=18"):
        data.encoded("train")
    described = data.describe()
    assert described["cut_prompts"]["train"] > 0
    assert described["rows"] == {"train": 30, "validation": 5, "test": 5}
    assert described["name"] == "rows"


def test_label_tokens_are_the_first_answer_tokens(causal, seq2seq):
    for tokenizer, is_encoder_decoder in ((causal, False), (seq2seq, True)):
        data = attached(tokenizer, is_encoder_decoder)
        ids = data.label_token_ids()
        assert all(ids[row.target] == row.answer_ids[0] for row in data.encoded("train"))


def test_label_words_with_one_first_token_are_refused(causal):
    data = attached(causal)
    data.label_words = ("positive", "positive film")
    with pytest.raises(InputError, match="'positive' and 'positive film'"):
        data.label_token_ids()


@pytest.mark.parametrize("option", ["max_length", "batch_size", "eval_batch_size"])
def test_options_out_of_range(option):
    with pytest.raises(InputError, match=f"data.{option}=0: expected at least 1"):
        Rows(**{option: 0})


def test_longest_first_is_stable():
    assert longest_first([1, 3, 3, 2]) == [1, 2, 3, 0]
