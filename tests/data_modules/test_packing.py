"""Packed rows learn what the same rows learn alone."""

import copy
import gzip
import random
from array import array
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from app.models.loading import load_model, load_tokenizer
from app.models.loss import supervised_loss
from app.models.source import resolve_model
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.packing import collate_packed, pack
from data_modules.rows import EncodedRow, TextRow, collate
from data_modules.text import TextDataModule
from tests.support.paths import DATA, needs_data


def best_fit_decreasing(lengths, room):
    """The same by looking at every pack: tokens of each pack."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, filled in enumerate(packs) if filled + length <= room]
        if fitting:
            packs[max(fitting, key=packs.__getitem__)] += length
        else:
            packs.append(length)
    return sorted(packs)


@pytest.mark.parametrize("room", [9, 20, 100])
def test_packs_are_those_of_best_fit_decreasing(room):
    lengths = [random.randint(1, 9) for _ in range(200)]
    packs = pack(lengths, room)
    assert sorted(row for rows in packs for row in rows) == list(range(200))
    filled = sorted(sum(lengths[row] for row in rows) for rows in packs)
    assert filled == best_fit_decreasing(lengths, room)
    assert max(filled) <= room


def test_a_packed_batch():
    tokens = (([5, 6], [7], 1), ([8], [9, 1], 0), ([4], [1], 0))
    rows = [
        EncodedRow(array("i", prompt), array("i", answer), index, target)
        for index, (prompt, answer, target) in enumerate(tokens)
    ]
    padding = replace(rows[2], index=-1, target=-1)
    batch = collate_packed([rows[:2], [rows[2], padding]], lambda some: collate(some, 3, False))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1], [4, 1, 4, 1, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 0]],
        "labels": [[-100, -100, 7, -100, 9, 1], [-100, 1, -100, -100, -100, -100]],
        "index": [0, 1, 2, -1],
        "target": [1, 0, 0, -1],
    }


class Rows(TextDataModule):
    """A source in memory: 40 rows of many lengths."""

    def load(self):
        rows = [TextRow(f"Q: {'a good film ' * (i % 7)}{i}\nA:", f"{i} is {i}") for i in range(40)]
        return {"train": rows, "validation": rows[:4]}


def supervised(batches):
    return sum(int((batch["labels"] >= 0).sum()) for batch in batches)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("length_grouping", [False, True])
def test_every_example_once_an_epoch_in_an_order_of_its_own(packing, length_grouping, causal):
    def batches_of(number, done=0, rank=0, world_size=1, **options):
        options = {"packing": packing, "length_grouping": length_grouping, **options}
        data = Rows(batch_size=3, **options)
        data._rank_and_world_size = lambda: (rank, world_size)
        data.attach(causal, is_encoder_decoder=False)
        data.load_state_dict({"epoch": number, "done": done, "group_size": 3 * world_size})
        return list(data.train_dataloader()), data

    def epoch(number, **options):
        batches, data = batches_of(number, **options)
        assert max(batch["input_ids"].shape[1] for batch in batches) <= data.max_length
        assert all(len(batch["input_ids"]) <= 3 for batch in batches)
        return [row for batch in batches for row in batch["index"].tolist()]

    order = epoch(0)
    assert sorted(order) == list(range(40))
    assert order == epoch(0, num_workers=1)
    assert order != epoch(1)
    assert order != epoch(0, seed=1)
    met = [row for batch in batches_of(0)[0][:2] for row in batch["index"].tolist()]
    assert order == met + epoch(0, done=6)
    # Of several processes each has as many batches, whose padding rows teach nothing.
    shares = [batches_of(0, rank=rank, world_size=7)[0] for rank in range(7)]
    assert len({len(share) for share in shares}) == 1
    together = [batch for share in shares for batch in share]
    rows = sorted(row for batch in together for row in batch["index"].tolist())
    assert rows[rows.count(-1) :] == list(range(40))
    assert rows.count(-1) > 0
    assert supervised(together) == supervised(batches_of(0)[0])


def test_rows_that_are_scored_are_not_packed(causal):
    data = Rows(packing=True)
    data.attach(causal, is_encoder_decoder=False)
    for batch in (*data.val_dataloader()[0], *data.gradient_batches(4, 4)):
        assert "position_ids" not in batch
        assert len(batch["input_ids"]) == 4


def loss_and_gradients(model, data, weighting):
    """Return the mean loss over all training rows, its gradients, and the number of rows computed."""
    model, rows, total, number = copy.deepcopy(model), 0, 0.0, 0
    for batch in data.train_dataloader():
        loss, counted = supervised_loss(model, model, batch, weighting)
        loss.backward()
        total, number = total + float(loss.detach()), number + counted
        rows += len(batch["input_ids"])
    return (
        total / number,
        {n: p.grad / number for n, p in model.named_parameters() if p.requires_grad},
        rows,
    )


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Return a file of 64 rows of GSM8K: every twentieth of the shorter ones, which are computed sooner."""
    lines = gzip.decompress((DATA / "gsm8k" / "train.jsonl.gz").read_bytes()).splitlines(True)
    file = tmp_path_factory.mktemp("gsm8k") / "train.jsonl"
    file.write_bytes(b"".join(sorted(lines, key=len)[:1280:20]))
    return file


def check_packed(model, tokenizer, file, batch_size, weighting="tokens"):
    found, number = [], len(file.read_text().splitlines())
    for packing in (False, True):
        options = {"packing": packing, "batch_size": batch_size, "validation_size": 0}
        data = Gsm8kDataModule(str(file), max_length=512, **options)
        data.attach(tokenizer, is_encoder_decoder=False)
        found.append(loss_and_gradients(model, data, weighting))
    (alone, wanted, rows), (packed, gradients, packs) = found
    assert (rows, packs < number / 2) == (number, True)
    assert packed == pytest.approx(alone, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.fixture(scope="module")
def words(gsm8k):
    """Return a tokenizer of GSM8K's words, so that its rows have about a hundred tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 1024, "special_tokens": ["<eos>"], "initial_alphabet": alphabet}
    core.train_from_iterator(gsm8k.read_text().splitlines(), trainers.BpeTrainer(**options))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@needs_data("gsm8k")
@pytest.mark.parametrize("weighting", ["tokens", "rows"])
@pytest.mark.parametrize(("build", "attention"), [("tiny_llama", "sdpa"), ("tiny_gpt2", "eager")])
def test_gsm8k_packed_and_unpacked(build, attention, weighting, request, words, gsm8k):
    model = request.getfixturevalue(build)(attn_implementation=attention, vocab_size=1024)
    check_packed(model, words, gsm8k, 4, weighting)


@needs_data("gsm8k")
@pytest.mark.smollm2
def test_gsm8k_packed_and_unpacked_on_smollm2(smollm2_dir, gsm8k, tmp_path):
    file = tmp_path / "sixteen.jsonl"
    file.write_text("".join(gsm8k.read_text().splitlines(keepends=True)[::4]))
    source = resolve_model(str(smollm2_dir))
    model = load_model(source).requires_grad_(False)
    for layer in model.model.layers[-6:]:  # what is below them is in the loss
        layer.self_attn.requires_grad_(True)
    check_packed(model, load_tokenizer(source), file, 2)
