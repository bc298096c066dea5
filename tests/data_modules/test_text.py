"""What every data module shares: loaders, the order of a resumed run, initialization rows, descriptions."""

import math
from itertools import chain

import lightning.pytorch as pl
import pytest
import torch

from app.utils.errors import InputError
from data_modules.encoding import TextRow
from data_modules.sampling import LengthGroupedSampler
from data_modules.text import TextDataModule
from tests.support.tokenizers import TEXTS, WORDS, byte_level


@pytest.fixture
def causal():
    return byte_level()


class Rows(TextDataModule):
    """A source in memory: 40 rows of four lengths."""

    task_name = "rows"
    label_words = WORDS

    def load(self):
        rows = [
            TextRow(f"classify: {i} {TEXTS[i % 4]}\nresult: ", WORDS[i % 2], i % 2)
            for i in range(40)
        ]
        return {"train": rows[:30], "validation": rows[30:35], "test": rows[35:]}


def attached(tokenizer, is_encoder_decoder=False, **options):
    data = Rows(batch_size=4, eval_batch_size=2, **options)
    data.attach(tokenizer, is_encoder_decoder)
    return data


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


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
    with pytest.raises(InputError, match=f"{num_samples} initialization samples from 30"):
        attached(causal).gradient_batches(num_samples, 4)


def test_a_smaller_training_subset_is_part_of_a_larger_one():
    small, large = (set(Rows(train_size=size).rows("train")) for size in (5, 20))
    assert len(small) == 5
    assert small < large
    assert set(Rows(train_size=5, seed=1).rows("train")) != small
    with pytest.raises(InputError, match=r"data.train_size=31: expected 1 to 30"):
        Rows(train_size=31).rows("train")


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
