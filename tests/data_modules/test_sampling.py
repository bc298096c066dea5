"""Which rows, in which order, on how many processes."""

import math

import pytest
import torch

from app.utils.errors import InputError
from data_modules.rows import TextRow
from data_modules.sampling import PADDING, LengthGroupedSampler, longest_first, split_off


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


def test_split_keeps_equal_prompts_together():
    rows = [TextRow(str(number // 2), str(number % 2)) for number in range(40)]
    rest, aside = split_off(rows, 10, "data.validation_size")
    assert (len(rest), len(aside)) == (30, 10)
    assert not {r.prompt for r in rest} & {r.prompt for r in aside}
    with pytest.raises(InputError, match=r"data.validation_size=40 of 40 rows"):
        split_off(rows, 40, "data.validation_size")
    assert split_off(rows, 0, "data.validation_size") == (rows, [])


@pytest.mark.parametrize(("prompts", "expected"), [(1, "expected 0, for none"), (3, "at least 8")])
def test_rows_of_few_prompts_cannot_be_split(prompts, expected):
    rows = [TextRow(str(number % prompts), str(number)) for number in range(24)]
    message = (
        rf"data.test_size=4 sets none of 24 rows aside: .*each prompt has \d+ rows.*{expected}"
    )
    with pytest.raises(InputError, match=message):
        split_off(rows, 4, "data.test_size")


def test_longest_first_is_stable():
    assert longest_first([1, 3, 3, 2]) == [1, 2, 3, 0]
