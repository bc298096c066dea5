"""Several training examples in one row, each of which the model reads as if it stood alone."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from app.models.batch import IGNORED_LABEL, Batch
from data_modules.rows import EncodedRow, PaddedRows
from data_modules.sampling import PADDING, draw, longest_first


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Distribute rows by best-fit decreasing: the longest first, each where the least room is left.

    Args:
        lengths: Tokens of each row, at most `room`.
        room: Most tokens of a pack.

    Returns:
        The row numbers of each pack.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, 1973: at most 11/9 of the fewest packs, and 4.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {}  # packs by the tokens that still fit
    rooms: list[int] = []  # its keys, sorted
    for row in longest_first(lengths):
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            left, chosen = room, list[int]()
            packs.append(chosen)
        else:
            left = rooms[at]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[at]
        chosen.append(row)
        left -= lengths[row]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    return packs


class PackedRows(Dataset[list[EncodedRow]]):
    """Packs of rows by number, and one of a padding row for every negative number.

    The packs are the same in every epoch; `seed` decides which of equally long rows come together, so that
    neighbours in a sorted file are spread.

    Args:
        rows: Each of at most `room` tokens.
        room: Most tokens of a pack.
        seed: Of the draw.
    """

    def __init__(self, rows: Sequence[EncodedRow], room: int, seed: int) -> None:
        self.rows = PaddedRows(rows)
        order, lengths = draw(len(rows), len(rows), seed, "packing"), self.rows.lengths
        packs = pack([lengths[row] for row in order], room)
        self.packs = [[order[place] for place in places] for places in packs]
        self.lengths = [sum(lengths[row] for row in rows) for rows in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[EncodedRow]:
        return [self.rows[row] for row in (self.packs[number] if number >= 0 else [PADDING])]


def collate_packed(
    packs: Sequence[Sequence[EncodedRow]], collate: Callable[[Sequence[EncodedRow]], Batch]
) -> Batch:
    """Join the rows of each pack, and pad the packs to one batch.

    Args:
        packs: B of them.
        collate: Makes a batch of rows of a causal model, padded.

    Returns:
        A packed batch, see `Batch`. Each padding token is an example of its own, at position 0.
    """
    parts = [collate(pack) for pack in packs]
    read = [part["attention_mask"].bool() for part in parts]
    positions = [torch.arange(mask.shape[1]).expand(mask.shape)[mask] for mask in read]

    def joined(name: str) -> list[Tensor]:
        return [part[name][mask] for part, mask in zip(parts, read, strict=True)]

    return {
        "input_ids": pad_sequence(joined("input_ids"), batch_first=True),
        "position_ids": pad_sequence(positions, batch_first=True),
        "labels": pad_sequence(joined("labels"), batch_first=True, padding_value=IGNORED_LABEL),
        **{name: torch.cat([part[name] for part in parts]) for name in ("index", "target")},
    }
