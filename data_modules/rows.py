"""One example as text and as token ids, and several as a batch."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from app.models.batch import IGNORED_LABEL, Batch


class Turn(NamedTuple):
    """One message of a conversation, of the role system, user or assistant, and whether it is supervised."""

    role: str
    content: str
    learnt: bool = False


@dataclass(frozen=True)
class TextRow:
    """One example as text: what the model reads, what it shall answer, and the answer's class, if any.

    The `turns` of a conversation end with one that is learnt. Its prompt is then the first question, its answer
    all that is learnt.
    """

    prompt: str
    answer: str
    target: int = 0
    turns: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        """All that the data says."""
        return "\n".join(turn.content for turn in self.turns) or self.prompt + self.answer


@dataclass(frozen=True)
class EncodedRow:
    """One example as token ids; those of the answer with its end are the supervised ones.

    Of a conversation, the answer is all behind the first prompt, and the stretches [begin, end) of it in
    `read_only` are not supervised. A padding row evens out the processes' numbers of rows: its `index` and
    `target` are -1, and none of its tokens is supervised.
    """

    prompt_ids: "array[int]"
    answer_ids: "array[int]"
    index: int
    target: int
    read_only: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def labels(self) -> list[int]:
        """The tokens of the answer, `IGNORED_LABEL` where nothing is supervised."""
        labels = self.answer_ids.tolist()
        for begin, end in self.read_only:
            labels[begin:end] = [IGNORED_LABEL] * (end - begin)
        return labels

    @property
    def num_supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.answer_ids) - sum(end - begin for begin, end in self.read_only)


class PaddedRows(Dataset[EncodedRow]):
    """Rows by number, and a padding row (the tokens of the shortest) for every negative number."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows
        self.lengths = [len(row) for row in rows]
        self.padding = replace(min(rows, key=len), index=-1, target=-1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> EncodedRow:
        return self.rows[number] if number >= 0 else self.padding


def collate(rows: Sequence[EncodedRow], pad_id: int, is_encoder_decoder: bool) -> Batch:
    """Pad encoded rows to one batch.

    Args:
        rows: B of them.
        pad_id: Token at padded inputs; it may equal EOS, since `attention_mask` tells padding.
        is_encoder_decoder: Whether prompt and answer are sequences of their own.

    Returns:
        `input_ids` and `attention_mask` (B, T), `labels` (B, L) with `IGNORED_LABEL` where nothing is
        learnt (causal: L == T, unshifted), `index` and `target` (B,), -1 in a padding row; all int64,
        padded at the right.
    """
    inputs, labels = [], []
    for row in rows:
        prompt, answer = row.prompt_ids.tolist(), row.answer_ids.tolist()
        wanted = [IGNORED_LABEL] * len(answer) if row.index < 0 else row.labels
        inputs.append(prompt if is_encoder_decoder else prompt + answer)
        before = [] if is_encoder_decoder else [IGNORED_LABEL] * len(prompt)
        labels.append(before + wanted)
    return {
        "input_ids": _pad(inputs, pad_id),
        "attention_mask": _pad([[1] * len(ids) for ids in inputs], 0),
        "labels": _pad(labels, IGNORED_LABEL),
        "index": torch.tensor([row.index for row in rows]),
        "target": torch.tensor([row.target for row in rows]),
    }


def _pad(sequences: list[list[int]], value: int) -> Tensor:
    """Stack lists of different lengths, filled up at the right."""
    longest = max(map(len, sequences))
    return torch.tensor([ids + [value] * (longest - len(ids)) for ids in sequences])
