"""What `plan` uses of a data module."""

from collections.abc import Sequence, Sized
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from app.models.batch import Batch
from app.training.protocols import DataModule


class EncodedRow(Sized, Protocol):
    """A row as token ids; its length is that of prompt and answer together."""

    target: int

    @property
    def num_supervised(self) -> int:
        """The number of supervised tokens."""


class RowEncoder(Protocol):
    """How rows become a batch that is not packed."""

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Pad encoded rows to one batch."""


class TrainingRows(Protocol):
    """Rows of training batches by number, which are packed examples where examples are packed."""

    lengths: Sequence[int]

    def __getitem__(self, number: int) -> Any:
        """Return a row."""


class PlannedData(DataModule, Protocol):
    """A data module whose rows are described; the attributes are its settings, and what it has read."""

    task_name: str
    source: str
    label_words: Sequence[str]
    max_length: int
    length_grouping: bool
    packing: bool
    eval_batch_size: int
    cut_prompts: dict[str, int]
    trainer: Trainer | None

    @property
    def encoder(self) -> RowEncoder:
        """How the model reads text."""

    def prepare_data(self) -> None:
        """Download published data."""

    def setup(self, stage: str) -> None:
        """Read and encode the rows of a stage."""

    def encoded(self, split: str) -> list[EncodedRow]:
        """Return the rows of "train" or "validation"."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of `TrainingRows`."""
