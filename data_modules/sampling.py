"""Which rows, in which order: drawing, splitting, and batches of similar length."""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DistributedSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from app.utils.errors import InputError
from data_modules.rows import TextRow

SPLIT_SEED = 0  # rows held out do not depend on `seed`: runs with other seeds meet the same ones
MOST_VALIDATION = 1000
PADDING = -1  # no row: where the processes would otherwise get unequal numbers of rows


class LengthGroupedSampler(DistributedSampler):
    """Order rows so that batches hold rows of similar length, the longest first.

    Of several processes each takes every world_size-th row of the same order, which keeps the global
    batches. Every row is met exactly once an epoch, whatever the number of processes: where a process
    would run out of rows first it gets `PADDING`. With `shuffle` off, rows are sorted by length; with
    `length_grouping` off, they are shuffled whatever their length.
    Lightning leaves a `DistributedSampler` in place and sets its epoch.

    Args:
        lengths: Length of each row.
        batch_size: Rows of a batch on each process.
        shuffle: Whether to draw a new order each epoch, from `seed`.
        length_grouping: Whether batches hold rows of similar length.
        group_size: Rows of all processes' batches together, which the order is made of; None is
            batch_size * world_size. A run that goes on with other processes keeps the old one.
        done: Rows of the order, of all processes together, that the first epoch leaves out because an
            interrupted run has met them.
        epoch: The first epoch: worker processes ask for rows before Lightning sets it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        length_grouping: bool = True,
        group_size: int | None = None,
        done: int = 0,
        epoch: int = 0,
    ) -> None:
        super().__init__(lengths, world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.group_size = group_size or batch_size * world_size
        self.done = done
        self.epoch = epoch
        self.length_grouping = length_grouping

    def __iter__(self) -> Iterator[int]:
        order = self._shuffled() if self.shuffle else longest_first(self.lengths)
        order, self.done = order[self.done :], 0
        return iter(equal_share(order, self.rank, self.num_replicas))

    def position(self, done: int) -> dict[str, int]:
        """Return epoch, rows done and size of groups, where all processes have met `done` rows of the epoch."""
        whole = done >= len(self.lengths)
        epoch, done = (self.epoch + 1, 0) if whole else (self.epoch, done)
        return {"epoch": epoch, "done": done, "group_size": self.group_size}

    def _shuffled(self) -> list[int]:
        """Group by length, then shuffle the batches but the longest and an incomplete last one; or all rows."""
        size = self.group_size
        generator = _generator(self.seed, f"epoch {self.epoch}")
        if not self.length_grouping:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        rows = get_length_grouped_indices(self.lengths, size, generator=generator)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        num_full = max(len(rows) // size, 1)
        moved = torch.randperm(num_full - 1, generator=generator) + 1
        batches = [batches[0], *(batches[i] for i in moved), *batches[num_full:]]
        return [row for batch in batches for row in batch]


def check_position(position: Mapping[str, int], batch_size: int, world_size: int) -> None:
    """Raise InputError if today's batches cannot begin where `LengthGroupedSampler.position` says."""
    rows, done = batch_size * world_size, position.get("done", 0)
    if done % rows:
        raise InputError(
            f"the checkpoint stands behind {done} rows of an epoch, which is no number of whole batches of "
            f"{rows} (data.batch_size={batch_size} on {world_size} processes): set data.batch_size so that "
            f"both together divide it, such as {position['group_size']} rows in all"
        )


def equal_share(order: list[int], rank: int, world_size: int) -> list[int]:
    """Return every world_size-th row number, with `PADDING` that makes all processes' shares equally large."""
    padding = [PADDING] * (-len(order) % world_size)
    return [*order, *padding][rank::world_size]


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return row numbers by falling length, equal ones in their order."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def draw(num_rows: int, size: int, seed: int, purpose: str) -> list[int]:
    """Draw row numbers for a purpose; a smaller draw is part of a larger one."""
    return torch.randperm(num_rows, generator=_generator(seed, purpose))[:size].tolist()


def subset(train: Sequence[TextRow], size: int, seed: int) -> list[TextRow]:
    """Return `size` training rows drawn by `seed`, in their order; see `TextDataModule.train_size`."""
    if not 1 <= size <= len(train):
        raise InputError(f"--data.train_size={size}: expected 1 to {len(train)}")
    return [train[number] for number in sorted(draw(len(train), size, seed, "train_size"))]


def initialization_share(
    lengths: Sequence[int],
    num_samples: int,
    seed: int,
    rank: int,
    world_size: int,
    drawn: bool = True,
    last: bool = False,
) -> list[int]:
    """Draw the training rows of the initialization, or take the first; see `TextDataModule.gradient_batches`.

    Returns:
        This process's row numbers, the longest first, as many on every process: `PADDING` where none is left.
    """
    if not 1 <= num_samples <= len(lengths):
        raise InputError(
            f"{num_samples} initialization samples from {len(lengths)} training rows: expected 1 "
            f"to {len(lengths)}; change num_samples of the initialization or --data.train_size"
        )
    order = list(range(len(lengths)))
    if drawn:
        # The stream's name is spelled as ever: another spelling would draw other rows.
        order = draw(len(order), len(order), seed, "initialisation")
    chosen = sorted(order[-num_samples:] if last else order[:num_samples])
    order = [chosen[i] for i in longest_first([lengths[row] for row in chosen])]
    return equal_share(order, rank, world_size)


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return a random stream of its own for each purpose."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {seed}".encode()))


def split_off(
    rows: Sequence[TextRow], size: int, setting: str
) -> tuple[list[TextRow], list[TextRow]]:
    """Set `size` rows aside, or as many as fit; rows with the same prompt stay on the same side.

    The `setting` that asks for it also keys the draw.

    Returns:
        The remaining rows and those set aside, each in the order of `rows`.

    Raises:
        InputError: `size` leaves no row, or rows of one prompt are more than `size`, whichever it is.
    """
    if not 0 <= size < len(rows):
        raise InputError(
            f"--{setting}={size} of {len(rows)} rows: expected 0 to {len(rows) - 1} of them"
        )
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(number)
    members = list(groups.values())
    aside: set[int] = set()
    for group in draw(len(members), len(members), SPLIT_SEED, setting):
        if len(aside) + len(members[group]) <= size:
            aside.update(members[group])
    if size and not aside:
        least = min(map(len, members))
        raise InputError(
            f"--{setting}={size} sets none of {len(rows)} rows aside: rows with the same prompt stay together, "
            f"and each prompt has {least} rows or more; expected "
            + (f"at least {least}, or 0 for none" if least < len(rows) else "0, for none")
        )
    rest = [row for number, row in enumerate(rows) if number not in aside]
    return rest, [row for number, row in enumerate(rows) if number in aside]


def tenth_for_validation(num_rows: int, source: str) -> int:
    """Return how many training rows validate where nobody has said: a tenth, at most 1,000; and say so."""
    size = min(MOST_VALIDATION, num_rows // 10)
    aside = (
        f"{size} training rows are"
        if size
        else f"a tenth of {num_rows} training rows is none, so none is"
    )
    rank_zero_info(
        f"{source} has no rows to validate on: {aside} set aside (--data.validation_size sets how many)"
    )
    return size
