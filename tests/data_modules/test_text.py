"""What every data module shares: loaders, the order of a resumed run, initialization rows, descriptions."""

import math
from itertools import chain

import pytest

from app.utils.errors import InputError
from data_modules.rows import TextRow
from data_modules.sampling import LengthGroupedSampler
from data_modules.text import TextDataModule
from tests.support.tokenizers import TEXTS, WORDS


class Rows(TextDataModule):
    """A source in memory: 40 rows of four lengths."""

    task_name = "rows"
    label_words = WORDS

    def load(self):
        prompts = [f"classify: {i} {TEXTS[i % 4]}\nresult: " for i in range(40)]
        rows = [TextRow(prompt, WORDS[i % 2], i % 2) for i, prompt in enumerate(prompts)]
        return {"train": rows[:30], "validation": rows[30:35], "test": rows[35:]}


def attached(tokenizer, **options):
    data = Rows(batch_size=4, eval_batch_size=2, **options)
    data.attach(tokenizer, is_encoder_decoder=False)
    return data


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def test_position_in_the_order_is_kept_and_checked(causal):
    data = attached(causal)
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
    for loader in (data.val_dataloader()[0], data.test_dataloader()[0]):
        seen = indices(loader)
        assert [len(part) for part in seen] == [2, 2, 1]
        assert sorted(flat(seen)) == list(range(5))
        assert seen == indices(loader)
    lengths = [int(n) for batch in data.val_dataloader()[0] for n in batch["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True)


def test_worker_processes_give_the_same_batches(causal):
    loaders = [attached(causal, num_workers=n).val_dataloader()[0] for n in (0, 1)]
    assert indices(loaders[0]) == indices(loaders[1])


def test_each_epoch_of_a_fit_has_its_own_order(fit, watched_fit):
    fit("--trainer.max_steps=-1", "--trainer.max_epochs=2")
    seen = flat(indices(watched_fit["batches"]))
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


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


def test_the_last_rows_of_the_draw_are_in_no_smaller_one(causal):
    data = attached(causal)
    rows = len(data.rows("train"))
    last = set(flat(indices(data.gradient_batches(5, 2, last=True))))
    in_order = flat(indices(data.gradient_batches(5, 2, drawn=False, last=True)))
    assert sorted(in_order) == list(range(rows - 5, rows))
    first = set(flat(indices(data.gradient_batches(rows - 5, 4))))
    assert len(last) == 5
    assert last.isdisjoint(first)
    assert last | first == set(range(rows))
    assert last < set(flat(indices(data.gradient_batches(6, 3, last=True))))


def test_gradient_rows_follow_the_seed(causal):
    def rows(**options):
        return sorted(flat(indices(attached(causal, **options).gradient_batches(8, 4))))

    assert rows() == rows()
    assert rows(seed=1) != rows()
    assert rows() != sorted(next(iter(attached(causal).train_dataloader()))["index"].tolist())


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_first_gradient_rows_are_those_of_the_file(world_size, causal):
    data = attached(causal)
    shares = [
        flat(indices(data.gradient_batches(7, 4, rank, world_size, drawn=False)))
        for rank in range(world_size)
    ]
    assert sorted(row for row in flat(shares) if row >= 0) == list(range(7))


@pytest.mark.parametrize("num_samples", [0, 31])
def test_gradient_rows_out_of_range(causal, num_samples):
    with pytest.raises(InputError, match=f"{num_samples} initialization samples from 30"):
        attached(causal).gradient_batches(num_samples, 4)


def test_a_smaller_training_subset_is_part_of_a_larger_one():
    small, large = (set(Rows(train_size=size).rows("train")) for size in (5, 20))
    assert len(small) == 5
    assert small < large
    assert set(Rows(train_size=5, seed=1).rows("train")) != small
    with pytest.raises(InputError, match=r"data.train_size=31: expected 1 to 30"):
        Rows(train_size=31).rows("train")


class Loads(Rows):
    """A source whose `load` returns rows of the splits named."""

    def __init__(self, *named, **options):
        super().__init__(**options)
        self.named = named

    def load(self):
        rows = super().load()
        return {name: rows.get(name, []) for name in self.named}


def test_a_split_that_is_left_out_has_no_rows(causal):
    data = Loads("train")
    data.attach(causal, is_encoder_decoder=False)
    with pytest.warns(
        UserWarning, match="Loads has no validation rows: the training is not scored"
    ):
        data.setup("fit")
    assert data.describe()["rows"] == {"train": 30, "validation": 0, "test": 0}
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("named", "stage", "message"),
    [
        (
            ["train", "val"],
            "fit",
            r"Loads.load\(\) returns rows of 'val': expected train, validation",
        ),
        (["validation"], "fit", "Loads has no rows to train on"),
        (["train"], "validate", "Loads has no rows to score: name a benchmark"),
        (["train", "validation"], "test", "Loads has no rows to score: name a benchmark"),
    ],
)
def test_splits_that_a_stage_cannot_use(named, stage, message, causal):
    data = Loads(*named)
    data.attach(causal, is_encoder_decoder=False)
    with pytest.raises(InputError, match=message):
        data.setup(stage)


def test_cut_prompts_are_reported_and_described(causal):
    data = attached(causal, max_length=18)
    with pytest.warns(UserWarning, match=r"of 30 prompts of rows train were cut .*max_length=18"):
        data.encoded("train")
    described = data.describe()
    assert described["cut_prompts"]["train"] > 0
    assert described["rows"] == {"train": 30, "validation": 5, "test": 5}
    assert described["name"] == "rows"


@pytest.mark.parametrize("option", ["max_length", "batch_size", "eval_batch_size"])
def test_options_out_of_range(option):
    with pytest.raises(InputError, match=f"data.{option}=0: expected at least 1"):
        Rows(**{option: 0})
